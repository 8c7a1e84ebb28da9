"""The sizes of an engine."""

from __future__ import annotations

import dataclasses

from specformer_jax.errors import require


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine; they fix every compiled program.

    Attributes:
      rows: the most requests that are read and decoded together.
      max_context: the most positions that a request may take, prompt and answer together; None is the target's limit.
      cache_positions: how many positions the cache holds, for all rows together and for what is kept of earlier
        requests; None holds half of what all rows may take. Where it is used up, the youngest request waits and is
        read again later.
      chunk: the most prompt tokens that a step reads. A prompt delays the running requests by so much at a time.
      max_queue: how many requests may wait.
      steps_per_call: the most steps between two looks at the rows.
      budgets: the numbers of tokens a step that may be chosen; None is `planning.budgets.step_budgets`. A single one
        fixes the program ("strict"). The largest has to seat all rows and some of a prompt.
      costs: a file for the measured cost table; a start that finds it there does not measure again.
      programs: a folder for compiled programs and, without `costs`, for what their steps were measured to cost; a start
        that finds its own there neither traces, nor compiles, nor measures. Not for models or drafters of one's own,
        whose sources nobody compares.
      forced_drafts: whether what a grammar leaves no choice about is drafted; without one sees what that brings.
    """

    rows: int = 16
    max_context: int | None = 2048
    cache_positions: int | None = None
    chunk: int = 128
    max_queue: int = 256
    steps_per_call: int = 4
    budgets: tuple[int, ...] | None = None
    costs: str | None = None
    programs: str | None = None
    forced_drafts: bool = True

    def __post_init__(self):
        leasts = {"rows": 1, "chunk": 16, "max_queue": 1, "steps_per_call": 1, "max_context": 2, "cache_positions": 1}
        values = ((field, getattr(self, field), least) for field, least in leasts.items())
        require(
            *(
                (value is None or value >= least, f"{field} {value} must be at least {least}")
                for field, value, least in values
            )
        )
