"""Tile sizes: a frozen record per kernel, chosen by a heuristic.

`using(blocks)` overrides it while tracing: a small case in tests is then cut into several tiles of each kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class AttentionBlocks:
    """How attention is tiled.

    Attributes:
      rows: how many query rows (anchors times draft slots times query heads of a group) a tile aims at.
      positions: how many positions of the context a tile holds.
    """

    rows: int
    positions: int


@dataclasses.dataclass(frozen=True)
class SampleBlocks:
    """How sampling is tiled.

    Attributes:
      rows: how many sampled rows a tile holds.
      columns: how many vocabulary entries a tile holds.
      depth: how much of the width a GPU multiplies in one step.
    """

    rows: int
    columns: int
    depth: int = 64


@dataclasses.dataclass(frozen=True)
class NormBlocks:
    """How the norm with the downsampling product is tiled.

    Attributes:
      rows: how many token positions a tile holds.
      columns: how many output columns a tile holds.
      depth: how much of the input width a GPU multiplies in one step.
    """

    rows: int
    columns: int
    depth: int = 64


Blocks = AttentionBlocks | SampleBlocks | NormBlocks

# By kernel, platform (with the dtype where it matters) and size class: "decode" for a few query rows, "long" for many.
_HEURISTIC: dict[tuple[type, str, str], Blocks] = {
    # TPU: large tiles of the context, as a grid step costs a third of a microsecond; 1024 positions of 128 bfloat16
    # numbers are 256 KB.
    (AttentionBlocks, "tpu", "decode"): AttentionBlocks(rows=128, positions=1024),
    (AttentionBlocks, "tpu", "long"): AttentionBlocks(rows=256, positions=512),
    (SampleBlocks, "tpu", "decode"): SampleBlocks(rows=512, columns=512),
    (SampleBlocks, "tpu", "long"): SampleBlocks(rows=256, columns=512),
    (NormBlocks, "tpu", "decode"): NormBlocks(rows=512, columns=512),
    (NormBlocks, "tpu", "long"): NormBlocks(rows=512, columns=512),
    # GPU: what registers and shared memory of one streaming multiprocessor hold.
    (AttentionBlocks, "cuda", "decode"): AttentionBlocks(rows=32, positions=64),
    (AttentionBlocks, "cuda", "long"): AttentionBlocks(rows=64, positions=32),
    (SampleBlocks, "cuda", "decode"): SampleBlocks(rows=32, columns=128),
    (SampleBlocks, "cuda", "long"): SampleBlocks(rows=32, columns=128),
    (NormBlocks, "cuda", "decode"): NormBlocks(rows=32, columns=64, depth=64),
    (NormBlocks, "cuda", "long"): NormBlocks(rows=64, columns=64, depth=64),
    # Hopper by Mosaic GPU: a product has 64 rows, and what holds two results of it spills from 128 columns on.
    (AttentionBlocks, "mosaic_gpu", "decode"): AttentionBlocks(rows=64, positions=64),
    (AttentionBlocks, "mosaic_gpu", "long"): AttentionBlocks(rows=64, positions=64),
    (SampleBlocks, "mosaic_gpu", "decode"): SampleBlocks(rows=64, columns=128),
    (SampleBlocks, "mosaic_gpu", "long"): SampleBlocks(rows=64, columns=128),
    # float32 there takes three tensor-core products each: more registers, smaller tiles before they spill.
    (AttentionBlocks, "cuda float32", "decode"): AttentionBlocks(rows=16, positions=16),
    (AttentionBlocks, "cuda float32", "long"): AttentionBlocks(rows=16, positions=16),
    (SampleBlocks, "cuda float32", "decode"): SampleBlocks(rows=32, columns=64, depth=32),
    (SampleBlocks, "cuda float32", "long"): SampleBlocks(rows=32, columns=64, depth=32),
    (NormBlocks, "cuda float32", "decode"): NormBlocks(rows=32, columns=64, depth=32),
    (NormBlocks, "cuda float32", "long"): NormBlocks(rows=32, columns=64, depth=32),
}

_override = jax.make_user_context(None)


@contextlib.contextmanager
def using(blocks: Blocks) -> Iterator[None]:
    """Inside this context `blocks` is what kernels of its kind use; part of the cache key of `jax.jit`."""
    with _override(blocks):
        yield


def pick(kind: type, platform: str, dtype, rows: int) -> Blocks:
    """The tile sizes for `rows` query rows in all: those of `using`, else the heuristic's."""
    override = _override.value
    if isinstance(override, kind):
        return override
    size = "decode" if rows <= 512 else "long"
    of_dtype = _HEURISTIC.get((kind, f"{platform} {jax.numpy.dtype(dtype).name}", size))
    return of_dtype or _HEURISTIC[kind, platform, size]
