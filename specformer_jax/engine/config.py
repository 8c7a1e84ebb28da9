"""The sizes of an engine, and the budgets of tokens a step that follow from them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

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
      budgets: the numbers of tokens a step that may be chosen; None is `step_budgets`. A single one fixes the program
        ("strict"), and has to seat all rows and a chunk.
      costs: a file for the measured cost table; a start that finds it there does not measure again.
    """

    rows: int = 16
    max_context: int | None = 2048
    cache_positions: int | None = None
    chunk: int = 128
    max_queue: int = 256
    steps_per_call: int = 4
    budgets: tuple[int, ...] | None = None
    costs: str | None = None

    def __post_init__(self):
        leasts = {"rows": 1, "chunk": 16, "max_queue": 1, "steps_per_call": 1}
        values = ((field, getattr(self, field), least) for field, least in leasts.items())
        require(
            *((value >= least, f"{field} {value} must be at least {least}") for field, value, least in values),
            (self.max_context is None or self.max_context >= 2, f"max_context {self.max_context} must be at least 2"),
        )


class StepBudget(NamedTuple):
    """One compiled step.

    Attributes:
      size: how many tokens it reads, T.
      chunk: how many of them may be prompts'; 0 reads none.
    """

    size: int
    chunk: int


def step_budgets(rows: int, drafts: int, chunk: int) -> tuple[StepBudget, ...]:
    """What is compiled: steps for one row and for all, plain and with drafts, some between, and two that read prompts.

    >>> [budget.size for budget in step_budgets(16, 4, 128)]
    [1, 3, 5, 8, 16, 24, 40, 80, 36, 144]
    >>> [budget.size for budget in step_budgets(2, 0, 16)]
    [1, 2, 6, 18]
    """
    most = 1 + drafts
    sizes = {1, 1 + drafts // 2, most, max(1, rows // 2), rows, rows * most}
    if drafts:
        sizes |= {rows * 3 // 2, rows * (2 + drafts) // 2 - rows // 2}
    found = sorted(sizes)
    filled = found[:1]
    for size in found[1:]:
        while size > 2.5 * filled[-1]:  # a step larger than need be costs in proportion
            filled.append(2 * filled[-1])
        filled.append(size)
    decoding = [StepBudget(size, 0) for size in filled]
    reading = [StepBudget(max(1, rows // part) + chunk // part, chunk // part) for part in (4, 1)]
    return (*decoding, *reading)
