"""The steps that an engine compiles, by how many tokens they read, and which of them its next call takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from specformer_jax.errors import require
from specformer_jax.planning.planner import BudgetPolicy, Plan, Row

CALL_SECONDS = 0.03  # what a call takes at most, unless its step takes more, while someone reads along


class StepBudget(NamedTuple):
    """One compiled step.

    Attributes:
      size: how many tokens it reads, T.
      chunk: how many of them may be prompts'; 0 reads none.
    """

    size: int
    chunk: int


class NextCall(NamedTuple):
    """What the next call does.

    Attributes:
      budget: what each of its steps reads.
      steps: how many there are.
      draft_cap: the most drafts of any row.
      plan: what the policy chose; None where prompts are read.
    """

    budget: StepBudget
    steps: int
    draft_cap: int
    plan: Plan | None

    @property
    def growth(self) -> int:
        """The most tokens that it can add to a row."""
        return self.steps * (1 + self.draft_cap)


def step_budgets(rows: int, drafts: int, chunk: int) -> tuple[StepBudget, ...]:
    """Steps for one row and for all, plainly and with drafts, some between, and two that read prompts.

    >>> [budget.size for budget in step_budgets(16, 4, 128)]
    [1, 3, 5, 8, 16, 24, 40, 80, 36, 144]
    >>> [budget.size for budget in step_budgets(2, 0, 16)]
    [1, 2, 5, 18]
    """
    most = 1 + drafts
    sizes = {1, 1 + drafts // 2, most, max(1, rows // 2), rows, rows * most}
    if drafts:
        sizes |= {rows * 3 // 2, rows * (2 + drafts) // 2 - rows // 2}
    found = sorted(sizes)
    filled = found[:1]
    for size in found[1:]:
        while size > 3 * filled[-1]:  # a step larger than need be costs in proportion
            filled.append(2 * filled[-1])
        filled.append(size)
    decoding = [StepBudget(size, 0) for size in filled]
    reading = [StepBudget(max(1, rows // part) + chunk // part, chunk // part) for part in (4, 1)]
    return (*decoding, *reading)


def split_budgets(
    sizes: Sequence[int] | None, *, rows: int, drafts: int, chunk: int, shards: int
) -> tuple[StepBudget, ...]:
    """What is compiled for a batch whose rows a mesh splits: every part of it can have its part of each size.

    Args:
      sizes: the T that are wanted; None is `step_budgets`. A prompt is read in the largest.
      rows: the rows of all parts.
      drafts: the most drafts of a row.
      chunk: the most prompt tokens of a step.
      shards: how many parts there are.

    Raises:
      UserError: sizes that do not seat the rows, or cannot be split.
    """
    if sizes is None:
        budgets = step_budgets(rows // shards, drafts, max(1, chunk // shards))
        return tuple(StepBudget(size * shards, part * shards) for size, part in budgets)
    *smaller, largest = sorted(set(sizes)) or [0]
    parts = "" if shards == 1 else f" and can be split into {shards} parts"
    require(
        (
            largest >= rows + shards and all(size >= 1 and size % shards == 0 for size in sizes),
            f"budgets {tuple(sizes)} must be numbers of tokens{parts}, the largest more than the {rows} rows",
        ),
    )
    return (*(StepBudget(size, 0) for size in smaller), StepBudget(largest, min(chunk, largest - rows)))


def next_call(
    budgets: Sequence[StepBudget],
    policy: BudgetPolicy,
    *,
    seats: int,
    unread: int,
    rows: Sequence[Row],
    steps: int,
    steady: bool,
) -> NextCall:
    """Chooses the budget: for prompts the smallest that reads what there is, for decoding what the policy says.

    Args:
      budgets: what is compiled.
      policy: chooses among the sizes that read no prompt.
      seats: how many places the rows take by themselves.
      unread: how many prompt tokens are to be read.
      rows: the rows that decode.
      steps: the most steps there may be.
      steady: someone reads along, so a call is short; of a step that nobody timed it has one.
    """
    seated = [budget for budget in budgets if budget.size >= seats]
    reading = sorted(budget for budget in seated if budget.chunk)
    if unread:
        wanted = seats + min(unread, reading[-1].chunk)
        budget = next((budget for budget in reading if budget.size >= wanted), reading[-1])
        return NextCall(budget, 1, policy.draft_cap, None)
    decoding = {budget.size: budget for budget in seated if not budget.chunk} or {b.size: b for b in reading}
    plan = policy.choose(sorted(decoding), rows)
    if steady:
        steps = max(1, min(steps, int(CALL_SECONDS / plan.seconds))) if plan.seconds else 1
    return NextCall(decoding[plan.size], steps, plan.draft_cap, plan)
