"""The sizes of an engine, and the batch sizes that follow from them."""

from __future__ import annotations

import dataclasses

from specformer_jax.errors import require


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine; they fix every compiled program.

    Attributes:
      rows: the most requests that decode together.
      max_context: the most positions that a request may take, prompt and answer together; None is the target's limit.
      chunk: the most prompt tokens read at a time.
      chunks_per_call: how many chunks are read between two decode calls. One delays the running requests least; large
        batches of short answers only fill with more.
      max_queue: how many requests may wait.
      steps_per_call: how many decode steps pass between two looks at the rows.
      prefixes: how many prompts are kept for reuse; each takes as much memory as a row.
      draft_lengths: the k that may be chosen; None is all that the drafter has, from 0 to J.
      costs: a file for the measured cost table; a start that finds it there does not measure again.
      elastic: whether smaller batches are compiled too, to shrink to when few requests run; without it every step
        computes all rows, which costs nothing only where compute is idle.
    """

    rows: int = 16
    max_context: int | None = 2048
    chunk: int = 128
    chunks_per_call: int = 1
    max_queue: int = 256
    steps_per_call: int = 4
    prefixes: int = 4
    draft_lengths: tuple[int, ...] | None = None
    costs: str | None = None
    elastic: bool = True

    def __post_init__(self):
        leasts = {"rows": 1, "chunk": 16, "chunks_per_call": 1, "max_queue": 1, "steps_per_call": 1, "prefixes": 2}
        values = ((field, getattr(self, field), least) for field, least in leasts.items())
        require(
            *((value >= least, f"{field} {value} must be at least {least}") for field, value, least in values),
            (self.max_context is None or self.max_context >= 2, f"max_context {self.max_context} must be at least 2"),
        )


def batch_sizes(rows: int) -> tuple[int, ...]:
    """Powers of two up to the rows, and the rows.

    >>> batch_sizes(12)
    (1, 2, 4, 8, 12)
    """
    return (*(2**i for i in range(rows.bit_length()) if 2**i < rows), rows)
