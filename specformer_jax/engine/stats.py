"""What an engine tells of itself: counts since its start, and speeds of late."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from specformer_jax.engine.scheduler import Outcome

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """The engine at one moment; counts are since its start.

    Attributes:
      rows: the most requests that decode together.
      pages: how many pages the cache has.
      healthy: whether the engine takes requests and answers them.
      queued: how many requests wait.
      running: how many requests are being read or decoded.
      chosen_budget: how many tokens each step of the latest call reads.
      drafts_per_row: how many of these are drafts, for each row that decodes.
      free_pages: how many pages of the cache no request holds.
      preempted: how many times a request left its row for lack of pages, to be read again later.
      steps: decode passes of the target, counted once for each row in them.
      drafts: how many of these passes verified at least one draft.
      draft_tokens: how many drafts were verified.
      accepted_tokens: how many drafts were accepted.
      accepted_per_position: how many drafts were accepted at each position of a step.
      prompt_tokens: tokens in the prompts of the requests admitted so far.
      cached_tokens: how many of the prompt tokens were reused from earlier prompts and answers.
      completion_tokens: tokens sent to callers.
      forecast_tokens_per_second: the speed that the planner expected of the latest decode calls.
      measured_tokens_per_second: the speed that these calls had.
    """

    rows: int
    pages: int
    healthy: bool = True
    queued: int = 0
    running: int = 0
    chosen_budget: int = 0
    drafts_per_row: float = 0.0
    free_pages: int = 0
    preempted: int = 0
    steps: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    forecast_tokens_per_second: float = 0.0
    measured_tokens_per_second: float = 0.0

    def count(self, outcome: Outcome, seconds: float) -> EngineStats:
        """These statistics with one more call counted, which was read back so long after the one before."""
        counted = dataclasses.replace(
            self,
            steps=self.steps + outcome.steps,
            drafts=self.drafts + int(outcome.drafted[:1].sum()),
            draft_tokens=self.draft_tokens + int(outcome.drafted.sum()),
            accepted_tokens=self.accepted_tokens + int(outcome.accepted.sum()),
            accepted_per_position=tuple((np.array(self.accepted_per_position, int) + outcome.accepted).tolist()),
            completion_tokens=self.completion_tokens + outcome.sent,
        )
        if outcome.plan is None or not outcome.alone:
            return counted
        forecast, measured = outcome.plan.tokens_per_second, outcome.tokens / max(seconds, 1e-9)
        size = outcome.plan.size
        log.debug(
            "%d rows, %d tokens a step: %.1f tokens/s forecast, %.1f measured",
            outcome.running,
            size,
            forecast,
            measured,
        )
        return dataclasses.replace(
            counted,
            forecast_tokens_per_second=_smooth(self.forecast_tokens_per_second, forecast),
            measured_tokens_per_second=_smooth(self.measured_tokens_per_second, measured),
        )


def _smooth(old: float, new: float) -> float:
    """A running average over some twenty calls."""
    return new if old == 0 else 0.95 * old + 0.05 * new
