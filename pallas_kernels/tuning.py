"""Tile sizes: a frozen record per kernel, from a table of what was measured on a device, else chosen by a heuristic.

The table is `tiles.json`, or the file that `SPECFORMER_TILES` names; `python -m benchmarks.accelerator` measures one.
`using(blocks)` overrides both while tracing: a small case in tests is then cut into several tiles of each kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from pallas_kernels import dispatch


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
KINDS: dict[str, type] = {"attention": AttentionBlocks, "sampling": SampleBlocks, "norm": NormBlocks}
# The most query rows of a size class: nine tokens with groups of seven heads, and a piece of a prompt.
WINDOW_ROWS, DECODE_ROWS = 64, 512

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


class TileKey(NamedTuple):
    """What measured tile sizes are for.

    Attributes:
      device: the device's own name, "NVIDIA H100 80GB HBM3" say.
      body: whose kernels they are: "tpu", "cuda" (Triton) or "mosaic_gpu".
      kernel: a key of `KINDS`.
      dtype: "bfloat16" or "float32".
      size: the class of the query rows: "window", "decode" or "long".
    """

    device: str
    body: str
    kernel: str
    dtype: str
    size: str


TileTable = Mapping[TileKey, Blocks]
TABLE_FILE = Path(__file__).with_name("tiles.json")

_override = jax.make_user_context(None)
_adopted: dict[TileKey, Blocks] = {}


@contextlib.contextmanager
def using(blocks: Blocks) -> Iterator[None]:
    """Inside this context `blocks` is what kernels of its kind use; part of the cache key of `jax.jit`."""
    with _override(blocks):
        yield


def adopt(table: TileTable) -> None:
    """This process takes these before those of the file; programs that were traced before are forgotten."""
    _adopted.update(table)
    jax.clear_caches()


def pick(kind: type, platform: str, dtype, rows: int) -> Blocks:
    """The tile sizes for `rows` query rows in all: of `using`, else those measured on this device, else a guess."""
    override = _override.value
    if isinstance(override, kind):
        return override
    size, dtype = size_class(kind, rows), jax.numpy.dtype(dtype).name
    if device := dispatch.device_kind():
        (kernel,) = (name for name, other in KINDS.items() if other is kind)
        key = TileKey(device, platform, kernel, dtype, size)
        if measured := _adopted.get(key) or _stored_table().get(key):
            return measured
    size = "decode" if size == "window" else size
    return _HEURISTIC.get((kind, f"{platform} {dtype}", size)) or _HEURISTIC[kind, platform, size]


def size_class(kind: type, rows: int) -> str:
    """Which entry of the table so many query rows take: a last token with its drafts is tuned apart from the rest.

    >>> [size_class(AttentionBlocks, rows) for rows in (36, 128, 1024)], size_class(SampleBlocks, 36)
    (['window', 'decode', 'long'], 'decode')
    """
    if rows > DECODE_ROWS:
        return "long"
    return "window" if kind is AttentionBlocks and rows <= WINDOW_ROWS else "decode"


@functools.cache
def _stored_table() -> TileTable:
    path = Path(os.environ.get("SPECFORMER_TILES") or TABLE_FILE)
    try:
        return parse(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no table of tile sizes ({error}): measure one anew") from error


def text(table: TileTable) -> str:
    """A table as JSON, one line an entry.

    >>> table = {TileKey("a chip", "tpu", "attention", "bfloat16", "window"): AttentionBlocks(16, 64)}
    >>> parse(text(table)) == table
    True
    """
    lines = [json.dumps(key._asdict() | dataclasses.asdict(blocks)) for key, blocks in sorted(table.items())]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def parse(text: str) -> TileTable:
    """The table that `text` wrote.

    Raises:
      ValueError: it is something else.
    """
    found: dict[TileKey, Blocks] = {}
    try:
        for entry in json.loads(text):
            key = TileKey(*(entry.pop(field) for field in TileKey._fields))
            found[key] = KINDS[key.kernel](**entry)
            if not all(type(size) is int and size > 0 for size in entry.values()):
                raise ValueError(f"tile sizes must be whole numbers: {entry}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an entry is incomplete or unknown: {error}") from error
    return found
