"""Tile sizes: a frozen record per kernel, a small table of known good ones, a heuristic for the rest.

`using(blocks)` overrides both while tracing, which is how `autotune` tries its candidates; its result is an entry for
`TABLE`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class AttentionBlocks:
    """rows: query rows (anchors x draft slots x query group) aimed at in a tile; slots: cache slots in a tile."""

    rows: int
    slots: int


@dataclasses.dataclass(frozen=True)
class SampleBlocks:
    """rows: sampled positions in a tile; columns: vocabulary entries in a tile; depth: width per step (GPU)."""

    rows: int
    columns: int
    depth: int = 64


@dataclasses.dataclass(frozen=True)
class NormBlocks:
    """rows: positions in a tile; columns: output columns in a tile; depth: input columns per step."""

    rows: int
    columns: int
    depth: int = 64


Blocks = AttentionBlocks | SampleBlocks | NormBlocks

# (record, platform, dtype, size class) -> measured best, of `tune.autotune`. The size class is what the
# heuristics look at: "decode" for a few query rows, "long" for many.
TABLE: dict[tuple[type, str, str, str], Blocks] = {}

_HEURISTIC: dict[tuple[type, str, str], Blocks] = {
    # TPU: large context tiles, as a grid step costs a third of a microsecond; 1024 slots x 128 x 2 bytes are 256 KB.
    (AttentionBlocks, "tpu", "decode"): AttentionBlocks(rows=128, slots=1024),
    (AttentionBlocks, "tpu", "long"): AttentionBlocks(rows=256, slots=512),
    (SampleBlocks, "tpu", "decode"): SampleBlocks(rows=512, columns=512),
    (SampleBlocks, "tpu", "long"): SampleBlocks(rows=256, columns=512),
    (NormBlocks, "tpu", "decode"): NormBlocks(rows=512, columns=512),
    (NormBlocks, "tpu", "long"): NormBlocks(rows=512, columns=512),
    # GPU: what registers and shared memory of one streaming multiprocessor hold.
    (AttentionBlocks, "cuda", "decode"): AttentionBlocks(rows=32, slots=64),
    (AttentionBlocks, "cuda", "long"): AttentionBlocks(rows=64, slots=32),
    (SampleBlocks, "cuda", "decode"): SampleBlocks(rows=32, columns=128),
    (SampleBlocks, "cuda", "long"): SampleBlocks(rows=32, columns=128),
    (NormBlocks, "cuda", "decode"): NormBlocks(rows=32, columns=64, depth=64),
    (NormBlocks, "cuda", "long"): NormBlocks(rows=64, columns=64, depth=64),
    # float32 there takes three tensor-core products each: more registers, smaller tiles before they spill.
    (AttentionBlocks, "cuda float32", "decode"): AttentionBlocks(rows=16, slots=16),
    (AttentionBlocks, "cuda float32", "long"): AttentionBlocks(rows=16, slots=16),
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
    """The tile sizes for `rows` query rows in all: the override, else the table, else the heuristic."""
    override = _override.value
    if isinstance(override, kind):
        return override
    size = "decode" if rows <= 512 else "long"
    name = jax.numpy.dtype(dtype).name
    known = TABLE.get((kind, platform, name, size))
    return known or _HEURISTIC.get((kind, f"{platform} {name}", size)) or _HEURISTIC[kind, platform, size]
