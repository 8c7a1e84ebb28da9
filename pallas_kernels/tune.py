"""Measures tile sizes on the device at hand: the best is an entry for `tuning.TABLE`.

from pallas_kernels import blocks, mixed_mask_attention, tune
best, seconds = tune.autotune(lambda: mixed_mask_attention(q, cache, start=start), blocks.AttentionBlocks)
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

from pallas_kernels import dispatch, tuning
from pallas_kernels.tuning import AttentionBlocks, Blocks, NormBlocks, SampleBlocks

_GRID: dict[tuple[type, str], list[Blocks]] = {
    (AttentionBlocks, "tpu"): [
        AttentionBlocks(r, s) for r, s in itertools.product((64, 128, 256, 512), (256, 512, 1024))
    ],
    (SampleBlocks, "tpu"): [SampleBlocks(r, c) for r, c in itertools.product((256, 512), (256, 512, 1024, 2048))],
    (NormBlocks, "tpu"): [NormBlocks(r, c) for r, c in itertools.product((128, 256, 512), (256, 512, 1024))],
    (AttentionBlocks, "cuda"): [
        AttentionBlocks(r, s) for r, s in itertools.product((16, 32, 64, 128), (16, 32, 64, 128))
    ],
    (SampleBlocks, "cuda"): [SampleBlocks(r, c, 64) for r, c in itertools.product((16, 32, 64), (64, 128, 256))],
    (NormBlocks, "cuda"): [NormBlocks(r, c, d) for r, c, d in itertools.product((16, 32, 64), (64, 128), (32, 64))],
}


def candidates(kind: type) -> list[Blocks]:
    """What `autotune` tries for a kernel's record on the platform at hand."""
    return _GRID[kind, "cuda" if dispatch.platform() == "cuda" else "tpu"]


def autotune(
    call: Callable[[], Any], kind: type, tries: Iterable[Blocks] | None = None, *, repeats: int = 10
) -> tuple[Blocks, dict[Blocks, float]]:
    """Times `call` under every candidate and returns the fastest.

    Args:
      call: runs the kernel on concrete operands; it is jitted here once per candidate.
      kind: the record of `blocks` that the kernel reads.
      tries: candidates; those of the platform by default. One that does not compile is left out.
      repeats: timed calls of each, after one that compiles.

    Returns:
      The fastest candidate, and the median seconds of each that ran.

    Raises:
      RuntimeError: no candidate ran; the message is the last one's.
    """
    seconds: dict[Blocks, float] = {}
    failure: Exception | None = None
    for size in candidates(kind) if tries is None else tries:
        with tuning.using(size):
            run = jax.jit(lambda: call())
            try:
                jax.block_until_ready(run())
            except Exception as error:  # too large for the chip: the compilers have no common class for that
                failure = error
                continue
            seconds[size] = statistics.median(_time(run) for _ in range(repeats))
    if not seconds:
        raise RuntimeError(f"no tile size ran: {failure}")
    return min(seconds, key=seconds.__getitem__), seconds


def _time(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin
