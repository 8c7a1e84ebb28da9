"""Which weights are packed for the native products of a CPU, and when."""

from __future__ import annotations

import logging
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from pallas_kernels import PackedMatrix, dispatch, pack, unpack

log = logging.getLogger(__name__)

# Parameters that `matmul` multiplies whole, by the end of their names, and how many of their first axes are inputs. The
# embedding stays as it is: tokens are looked up in it, and the LM head's product reads its rows.
_INPUT_AXES = {
    "qkv/kernel": 1,
    "query/kernel": 1,
    "kv/kernel": 1,
    "out/kernel": 2,
    "gate_up": 1,
    "down": 1,
    "slot_gate_up": 1,
    "downsampler/kernel": 2,
    "fuse/kernel": 2,
    "slots/kernel": 1,
}


def packs(dtype: str, mesh: Mesh | None) -> bool:
    """Whether a model of this dtype is loaded packed; on a CPU without native bodies a warning says what it costs."""
    if dtype != "bfloat16" or (mesh is not None and mesh.size > 1):
        return False
    reason = dispatch.native_unavailable()
    if reason is not None and dispatch.platform() == "cpu" and not dispatch.native_ruled_out():
        log.warning("decoding in bfloat16 takes about twice as long as it could: %s", reason)
    return reason is None


def input_axes(name: str) -> int | None:
    """How many of a parameter's first axes are inputs of a native product; None if it stays as it is.

    Args:
      name: path of the parameter, "layer_0/ffn/down" say.
    """
    return next((axes for end, axes in _INPUT_AXES.items() if name == end or name.endswith("/" + end)), None)


def packed(name: str, host: np.ndarray) -> PackedMatrix | None:
    """A bfloat16 parameter of this name in packed form, None if it stays as it is."""
    axes = input_axes(name)
    return None if axes is None else pack(host, axes)


def pack_tree(params: Any) -> Any:
    """A drafter's parameters on the device, in bfloat16, packed where they are multiplied."""
    flat = {name: np.asarray(x, ml_dtypes.bfloat16) for name, x in traverse_util.flatten_dict(params, sep="/").items()}
    placed = {name: packed(name, host) or jax.device_put(host) for name, host in flat.items()}
    return traverse_util.unflatten_dict(placed, sep="/")


def unpack_tree(params: Any) -> Any:
    """Parameters as plain arrays, as training needs them; what is not packed is the same array."""
    is_packed = lambda leaf: isinstance(leaf, PackedMatrix)
    return jax.tree.map(lambda leaf: unpack(leaf) if is_packed(leaf) else leaf, params, is_leaf=is_packed)
