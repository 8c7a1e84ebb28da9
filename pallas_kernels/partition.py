"""Kernels on a mesh: a compiler cannot split a kernel by itself, so each call is wrapped in `shard_map`.

Inside

    with partitioned(mesh, rows=("data", "fsdp"), heads="model", vocab="model", columns="model"):
        jax.jit(step)(...)

every public function of this package splits its own operands that way: attention over rows and key/value heads, the
sampling kernels over rows and vocabulary, the downsampling product over positions and output columns. None of them
needs more than a few numbers a row from the other devices. The reference needs no wrapping: XLA splits it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Partition:
    """The mesh and which of its axes split rows, heads, vocabulary and the downsampling product's columns."""

    mesh: Mesh
    rows: Axes = None
    heads: Axes = None
    vocab: str | None = None
    columns: Axes = None

    def split(self, axes: Axes) -> int:
        """How many ways `axes` split an array."""
        names = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(self.mesh.shape[name] for name in names)

    def where_it_divides(self, size: int, axes: Axes) -> Axes:
        """`axes` if they divide `size`, else None: keep it whole."""
        return axes if size % self.split(axes) == 0 else None


_partition = jax.make_user_context(None)


@contextlib.contextmanager
def partitioned(
    mesh: Mesh, *, rows: Axes = None, heads: Axes = None, vocab: str | None = None, columns: Axes = None
) -> Iterator[None]:
    """Inside this context kernels are split over `mesh`; part of the cache key of `jax.jit`."""
    with _partition(Partition(mesh, rows, heads, vocab, columns)):
        yield


def current() -> Partition | None:
    """The partition in force, or None: outside of `partitioned`, and inside the split calls themselves."""
    return _partition.value


def split_call(function: Callable[..., Any], in_specs: Any, out_specs: Any, *operands: Any) -> Any:
    """Calls function on this device's share of the operands; specs as `jax.shard_map`, with None for None."""
    partition = current()
    flat, tree = jax.tree.flatten(operands)
    specs = jax.tree.leaves(in_specs, is_leaf=lambda x: isinstance(x, PartitionSpec))

    def local(*flat):
        with _partition(None):
            return function(*jax.tree.unflatten(tree, flat))

    # Kernels say nothing of how their results vary over the mesh, so that check is off.
    return jax.shard_map(local, mesh=partition.mesh, in_specs=tuple(specs), out_specs=out_specs, check_vma=False)(*flat)
