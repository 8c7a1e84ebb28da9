"""How many tokens a step should read, chosen by what its drafts are expected to add and what it costs here.

A step that reads T tokens of B rows takes seconds[T] on the device at hand, longer where the rows' contexts are long
(`cost_table`). It commits one token a row, and of its T - B drafts, the likeliest ones of all rows, the sum of their
survivals. So the rate to maximise is

    (B + the T - B largest survivals) / seconds(T, positions)

over the compiled T that seat every row, and plain decoding with the smallest, which makes no drafts and takes less.
Survivals are known of drafts that are verified by now, so a few rows' would say little of the ones to come: what the
n-th best draft brings is averaged over the latest calls of so many rows. Which drafts are read is for each step to say.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from jaxtyping import Float, Int

from specformer_jax.planning.calibration import Calibration
from specformer_jax.planning.cost_table import CostTable

log = logging.getLogger(__name__)

MILD_PRIOR = 0.4  # a draft is right once all before it were, for a head whose card says nothing
MARGIN = 0.04  # what a larger budget must promise more before it is taken, and drafts more than none
NEARLY = 0.02  # a smaller budget may promise so much less and is taken: of two that promised alike it brought more
EXPLORE_EVERY = 64  # of so many calls the last two verify more drafts, to see what those would bring
EXPLORE_CALLS = 2  # the first may be of one step, and then only makes them
LATEST = 0.2  # what a call's survivals weigh in what its drafts are expected to bring
TYPICAL = 0.05  # what a call's mean survivals weigh in the typical ones


class Row(NamedTuple):
    """A row that decodes.

    Attributes:
      survival: the chance that each of its drafts and all before it are right; None where it has no drafts yet.
      cap: the most drafts that it takes.
      positions: how many positions it has in the cache.
    """

    survival: Float[np.ndarray, " J"] | None
    cap: int
    positions: int


class Option(NamedTuple):
    """What a step may be; the plain one comes first.

    Attributes:
      size: T, how many tokens it reads.
      drafts: whether it verifies drafts and makes the next ones.
    """

    size: int
    drafts: bool


class Plan(NamedTuple):
    """What the policy chose for a call.

    Attributes:
      size: how many tokens each step reads.
      draft_cap: the most drafts of any row; with 0 it is plain decoding, and nothing is proposed.
      tokens_per_second: how many tokens a second the batch is expected to commit with the best size.
      seconds: how long a step is expected to take; 0 where nobody knows.
    """

    size: int
    draft_cap: int
    tokens_per_second: float
    seconds: float


class BudgetPolicy(Protocol):
    """How many tokens a step reads; the engine asks before every call that reads no prompt.

    Attributes:
      calibration: what a drafter's confidence is worth.
      draft_cap: the most drafts of any row, as it was chosen last.
    """

    calibration: Calibration
    draft_cap: int

    def choose(self, sizes: Sequence[int], rows: Sequence[Row]) -> Plan:
        """Chooses T for the next call.

        Args:
          sizes: the compiled T that seat every row, ascending.
          rows: the rows that decode.
        """


class FixedDrafts:
    """Always so many drafts a row, whatever they are worth: for comparisons, and for engines without a drafter."""

    def __init__(self, draft_cap: int, calibration: Calibration):
        self.draft_cap, self.calibration = draft_cap, calibration

    def choose(self, sizes: Sequence[int], rows: Sequence[Row]) -> Plan:
        wanted = sum(1 + min(self.draft_cap, row.cap) for row in rows)
        return Plan(next((size for size in sizes if size >= wanted), sizes[-1]), self.draft_cap, 0.0, 0.0)


class Planner:
    """Chooses T by expected tokens per second; see the module.

    Attributes:
      costs: how long a step takes.
      calibration, draft_cap: see `BudgetPolicy`.
    """

    def __init__(self, costs: CostTable, calibration: Calibration, slots: int, prior: Sequence[float] | None = None):
        """
        Args:
          costs: how long a step takes, for every T that may be chosen.
          calibration: what a drafter's confidence is worth.
          slots: J, the drafts of a row at most.
          prior: how often the drafts up to each slot are all right, f[J], to begin with; None is a mild guess.
        """
        self.costs, self.calibration, self.draft_cap = costs, calibration, slots
        self._typical = np.cumprod(chances(slots, prior))
        self._last: dict[int, Option] = {}  # by the number of rows
        self._gains: dict[tuple[int, int], np.ndarray] = {}  # by the numbers of rows and of their drafts
        self._calls = 0

    def choose(self, sizes: Sequence[int], rows: Sequence[Row]) -> Plan:
        """Chooses the T of the highest expected rate; see `BudgetPolicy`."""
        known = [row.survival for row in rows if row.survival is not None]
        if known:
            self._typical = (1 - TYPICAL) * self._typical + TYPICAL * np.mean(known, axis=0)
        gains = self._expected(rows)
        positions = sum(row.positions for row in rows)
        full = next((size for size in sizes if size >= len(rows) + len(gains)), max(sizes))
        drafting = [size for size in sizes if len(rows) < size <= full]  # in larger ones places would stay empty
        options = [Option(min(sizes), False), *(Option(size, True) for size in drafting)]
        seconds = {option: self.costs.of(option.size, positions, option.drafts) for option in options}
        added = {option: gains[: option.drafts * (option.size - len(rows))].sum() for option in options}
        rates = {option: (len(rows) + added[option]) / seconds[option] for option in options}
        chosen = best(rates, self._last.get(len(rows)))
        self._last[len(rows)] = chosen
        promised = rates[chosen]
        larger = [option for option in options if option > chosen]
        self._calls += 1
        if larger and len(gains) and -self._calls % EXPLORE_EVERY < EXPLORE_CALLS:
            chosen = min(larger)
        self.draft_cap = len(self._typical) if chosen.drafts else 0
        return Plan(chosen.size, self.draft_cap, promised, seconds[chosen])

    def _expected(self, rows: Sequence[Row]) -> np.ndarray:
        """What the n-th best draft of these rows is expected to bring; a row that has none yet is a typical one."""
        survival = np.array([self._typical if row.survival is None else row.survival for row in rows])
        gains = best_drafts(survival, np.array([row.cap for row in rows]))
        key = len(rows), len(gains)
        before = self._gains.get(key, gains)
        if any(row.survival is not None for row in rows):
            self._gains[key] = before + LATEST * (gains - before)
        return self._gains.get(key, before)


def best_drafts(survival: Float[np.ndarray, "B J"], caps: Int[np.ndarray, " B"]) -> Float[np.ndarray, " drafts"]:
    """The survivals of all drafts that may be read, the largest first.

    >>> best_drafts(np.array([[0.9, 0.3], [0.5, 0.4]]), np.array([2, 1])).tolist()
    [0.9, 0.5, 0.3]
    """
    taken = np.arange(survival.shape[1]) < caps[:, None]
    return np.sort(survival[taken])[::-1]


def chances(slots: int, acceptance: Sequence[float] | None) -> np.ndarray:
    """How often a draft is right once all before it were, f64[J]; a mild guess where nothing is known.

    Args:
      slots: J, the drafts of a step at most.
      acceptance: how often the drafts up to each slot are all right, f[J] or fewer.

    >>> chances(3, [0.5, 0.2]).tolist()
    [0.5, 0.4, 0.4]
    """
    found = np.full(slots, MILD_PRIOR)
    if acceptance is not None:
        known = np.maximum(acceptance, 1e-3)[:slots]
        found[: len(known)] = np.minimum(known / np.concatenate([[1.0], known[:-1]]), 1.0)
    return found


T = TypeVar("T", int, Option)


def best(rates: dict[T, float], current: T | None) -> T:
    """The step of the highest rate, or one that is close; they are told apart by T or as `Option`s.

    The current one stays unless a larger promises `MARGIN` more or a smaller at most `NEARLY` less. The smallest is
    taken wherever nothing promises `MARGIN` more than it.

    >>> best({1: 100.0, 2: 103.0}, current=2), best({1: 100.0, 2: 105.0}, current=1)
    (1, 2)
    >>> best({1: 90.0, 2: 100.0, 3: 103.0}, current=2)
    2
    """
    top = max(rates, key=lambda size: rates[size])
    close = [size for size in rates if rates[top] <= rates[size] * (1 + MARGIN)]
    if min(rates) in close:
        return min(rates)
    kept = current if current in close else top
    return min(size for size in close if size <= kept and rates[kept] <= rates[size] * (1 + NEARLY))
