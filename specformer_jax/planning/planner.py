"""How many drafts a step should verify, chosen by what it is expected to commit and what it costs here.

A step over B rows that verifies k drafts takes seconds[B, k] on the device at hand (`costs`), and commits, for each
row, one token and every draft that is right together with all before it. So the rate to maximise is

    sum over rows of (1 + a_1 + ... + a_min(k, cap)) / seconds[B, k]

where a_j is how often a row's first j drafts are all right: the product of the chances of each once those before it
were right, which are counted for each request, older passes weighing less, and lean on the counts of all requests
while it is young. k = 0 is plain decoding.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Float64, Int

from specformer_jax.planning.cost_table import CostTable

log = logging.getLogger(__name__)

MILD_PRIOR = 0.4  # a draft is right once all before it were, for a head whose card says nothing
PRIOR_WEIGHT = 8.0  # trials that the prior counts for, among all requests
REQUEST_WEIGHT = 16.0  # trials that all requests count for, in the estimate of one
MEMORY = 2000.0  # trials after which an observation counts for 1/e, among all requests
REQUEST_MEMORY = 100.0  # the same within a request
MARGIN = 0.04  # what a larger k must promise more before it is taken, and drafts more than none
NEARLY = 0.02  # a smaller k may promise so much less and is taken: of two that promised alike it brought more
EXPLORE_EVERY = 64  # decode calls between two that verify more drafts, to see what those would bring


class AcceptanceCounts:
    """Running counts of how often a draft is right once all before it were, by position; old passes weigh less.

    Attributes:
      trials: how often the draft at each position stood after right ones only, decayed.
      right: how often it was right then, decayed.
    """

    trials: Float64[np.ndarray, " J"]
    right: Float64[np.ndarray, " J"]

    def __init__(self, positions: int, memory: float):
        """
        Args:
          positions: J, the drafts of a step at most.
          memory: after how many trials an observation counts for 1/e.
        """
        self.trials = np.zeros(positions)
        self.right = np.zeros(positions)
        self._memory = memory

    def observe(self, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """Adds some passes at one k.

        Args:
          drafted: how many drafts were verified at each position, i[J].
          accepted: how many of them were accepted together with all before them, i[J].
        """
        reached = np.concatenate([drafted[:1], np.minimum(accepted[:-1], drafted[1:])])
        keep = np.exp(-reached / self._memory)
        self.trials = self.trials * keep + reached
        self.right = self.right * keep + accepted

    def estimate(self, prior: np.ndarray, weight: float) -> np.ndarray:
        """How often a draft is right once all before it were, leaning on a prior that counts for so many trials."""
        return (self.right + weight * prior) / (self.trials + weight)


class Plan(NamedTuple):
    """What the policy chose for a call.

    Attributes:
      draft_length: how many drafts each step verifies, k.
      tokens_per_second: how many tokens a second the batch is expected to commit with it.
    """

    draft_length: int
    tokens_per_second: float


class DraftLengthPolicy(Protocol):
    """How many drafts a step verifies; the engine asks before every decode call, and tells what the call did."""

    def choose(self, size: int, rows: Sequence[tuple[AcceptanceCounts, int]], *, explore: bool) -> Plan:
        """Chooses k for the next call.

        Args:
          size: how many rows the batch has, free ones included.
          rows: the counts of each running request, and the most drafts that it takes.
          explore: whether the call is long enough for further drafts to be made and verified, to see what they bring.
        """

    def observe(self, request: AcceptanceCounts, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """Learns what a call did for one request; see `AcceptanceCounts.observe`."""


@dataclasses.dataclass
class FixedDraftLength:
    """Always the same k, or the most that the requests take: for comparisons."""

    draft_length: int

    def choose(self, size: int, rows: Sequence[tuple[AcceptanceCounts, int]], *, explore: bool) -> Plan:
        return Plan(min(self.draft_length, max(cap for _, cap in rows)), 0.0)

    def observe(self, request: AcceptanceCounts, drafted: np.ndarray, accepted: np.ndarray) -> None:
        pass


class Planner:
    """Chooses k by expected tokens per second; see the module.

    Attributes:
      costs: how long a step takes, by rows and drafts.
      everyone: how often drafts were right, over all requests.
    """

    def __init__(self, costs: CostTable, positions: int, prior: Sequence[float] | None = None):
        """
        Args:
          costs: how long a step takes; the k of this table are those that may be chosen.
          positions: J, the drafts of a step at most.
          prior: how often the drafts up to each position are all right, f[J], to begin with; None is a mild guess.
        """
        self._prior = chances(positions, prior)
        self.costs = costs
        self.everyone = AcceptanceCounts(positions, MEMORY)
        self._last: dict[int, int] = {}  # k by batch size
        self._calls = 0

    def observe(self, request: AcceptanceCounts, drafted: np.ndarray, accepted: np.ndarray) -> None:
        request.observe(drafted, accepted)
        self.everyone.observe(drafted, accepted)

    def choose(self, size: int, rows: Sequence[tuple[AcceptanceCounts, int]], *, explore: bool) -> Plan:
        """Chooses the k of the highest expected rate; see `DraftLengthPolicy`."""
        everyone = self.everyone.estimate(self._prior, PRIOR_WEIGHT)
        chances = np.array([request.estimate(everyone, REQUEST_WEIGHT) for request, _ in rows])
        acceptance = np.cumprod(chances, axis=1)
        caps = np.array([cap for _, cap in rows])
        rates = {
            k: expected_tokens(acceptance, caps, k) / self.costs.seconds[size, k]
            for k in self.costs.draft_lengths
            if k <= caps.max()
        }
        k = best(rates, self._last.get(size))
        self._last[size] = k
        self._calls += explore
        larger = [other for other in rates if other > k]
        if explore and larger and self._calls % EXPLORE_EVERY == 0:
            k = min(larger)
        return Plan(k, rates[k])


def chances(positions: int, acceptance: Sequence[float] | None) -> np.ndarray:
    """How often a draft is right once all before it were, f64[J]; a mild guess where nothing is known.

    Args:
      positions: J, the drafts of a step at most.
      acceptance: how often the drafts up to each position are all right, f[J] or fewer.

    >>> chances(3, [0.5, 0.2]).tolist()
    [0.5, 0.4, 0.4]
    """
    found = np.full(positions, MILD_PRIOR)
    if acceptance is not None:
        known = np.maximum(acceptance, 1e-3)[:positions]
        found[: len(known)] = np.minimum(known / np.concatenate([[1.0], known[:-1]]), 1.0)
    return found


def expected_tokens(acceptance: Float[np.ndarray, "B J"], caps: Int[np.ndarray, " B"], draft_length: int) -> float:
    """Tokens that one step is expected to commit over all rows.

    Args:
      acceptance: how often the first j + 1 drafts of each row are all right.
      caps: the most drafts that each row takes.
      draft_length: how many drafts the step verifies, k.

    >>> expected_tokens(np.array([[0.5, 0.25], [0.5, 0.25]]), np.array([2, 0]), 2)
    2.75
    """
    taken = np.arange(acceptance.shape[1]) < np.minimum(caps, draft_length)[:, None]
    return float(len(caps) + (acceptance * taken).sum())


def best(rates: dict[int, float], current: int | None) -> int:
    """The k of the highest rate, or one that is close.

    The current one stays unless a larger promises `MARGIN` more or a smaller at most `NEARLY` less. Plain decoding is
    taken wherever nothing promises `MARGIN` more than it: rows that end sooner leave rows empty until the next prompt
    has been read, which the costs of a step do not show.

    >>> best({0: 100.0, 1: 103.0}, current=1), best({0: 100.0, 1: 105.0}, current=0), best({1: 100.0, 2: 103.0}, 1)
    (0, 1, 1)
    >>> best({1: 99.0, 2: 100.0}, current=2), best({1: 97.0, 2: 100.0}, current=2)
    (1, 2)
    """
    top = max(rates, key=lambda k: rates[k])
    close = [k for k in rates if rates[top] <= rates[k] * (1 + MARGIN)]
    if 0 in close:
        return 0
    kept = current if current in close else top
    return min(k for k in close if k <= kept and rates[kept] <= rates[k] * (1 + NEARLY))
