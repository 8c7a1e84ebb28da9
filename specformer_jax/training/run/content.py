"""What a training state holds, to the bit: digests that do not depend on the mesh, and what is not finite."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def examine(state: Any) -> tuple[dict[str, str], list[str]]:
    """Looks at every array of a state, one at a time; on several hosts each of them has to.

    Args:
      state: a pytree of arrays, on any mesh.

    Returns:
      The SHA-256 of each array's bytes by its path in the tree, and the paths of those that are not finite.

    >>> examine({"a": np.array([1.0, np.nan], np.float32)})[1]
    ['a']
    """
    digests, broken = {}, []
    for path, leaf in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        host = np.ascontiguousarray(leaf)
        digests[name] = hashlib.sha256(host.reshape(-1).view(np.uint8).data).hexdigest()
        if jnp.issubdtype(host.dtype, jnp.floating) and not np.isfinite(host).all():
            broken.append(name)
    return digests, broken
