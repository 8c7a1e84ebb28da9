"""The sizes of an engine, and what it tells of itself."""

from __future__ import annotations

import dataclasses

import numpy as np

from specformer_jax.engine.scheduler import Outcome
from specformer_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine; they fix every compiled program.

    Attributes:
      rows: the most requests that decode together.
      max_context: the most positions of a request, prompt and answer; None is the target's own limit.
      chunk: the most prompt tokens read at a time.
      chunks_per_call: chunks read between two decode calls. One delays the running requests least; large batches of
        short answers only fill with more.
      max_queue: requests that may wait.
      steps_per_call: decode steps between two looks at the rows.
      prefixes: prompts kept for reuse, each as large as a row.
      draft_lengths: the k that may be chosen; None is all from 0 to the head's J.
      costs: a file for the measured cost table; a start that finds it there does not measure again.
      elastic: compile smaller batches too and shrink to them when few requests run; without it every step computes
        all rows, which costs nothing only where compute is idle.
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
        for field, least in leasts.items():
            if getattr(self, field) < least:
                raise UserError(f"{field} {getattr(self, field)} must be at least {least}")
        if self.max_context is not None and self.max_context < 2:
            raise UserError(f"max_context {self.max_context} must be at least 2")


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """The engine at one moment; counts are since its start.

    Attributes:
      rows: the most requests that decode together.
      healthy: it takes requests and answers them.
      queued: requests waiting.
      running: requests being read or decoded.
      chosen_draft_length: k of the latest decode call.
      steps: passes of each row, added up.
      drafts: passes that verified at least one draft.
      draft_tokens: drafts verified.
      accepted_tokens: drafts accepted.
      accepted_per_position: of them, by position.
      prompt_tokens: of the requests admitted.
      cached_tokens: of them, reused from earlier prompts.
      completion_tokens: sent.
      forecast_tokens_per_second: what the planner expected of the latest decode calls.
      measured_tokens_per_second: what they made.
    """

    rows: int
    healthy: bool = True
    queued: int = 0
    running: int = 0
    chosen_draft_length: int = 0
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

    def count(self, outcome: Outcome) -> EngineStats:
        """With what a call did."""
        drafted, accepted = outcome.drafted.sum(axis=0), outcome.accepted.sum(axis=0)
        return dataclasses.replace(
            self,
            steps=self.steps + int(outcome.steps.sum()),
            drafts=self.drafts + int(drafted[:1].sum()),
            draft_tokens=self.draft_tokens + int(drafted.sum()),
            accepted_tokens=self.accepted_tokens + int(accepted.sum()),
            accepted_per_position=tuple((np.array(self.accepted_per_position, int) + accepted).tolist()),
            completion_tokens=self.completion_tokens + outcome.sent,
        )

    def compare(self, forecast: float, measured: float) -> EngineStats:
        """With the tokens a second expected of a call, and those that it made."""
        return dataclasses.replace(
            self,
            forecast_tokens_per_second=_smooth(self.forecast_tokens_per_second, forecast),
            measured_tokens_per_second=_smooth(self.measured_tokens_per_second, measured),
        )


def _smooth(old: float, new: float) -> float:
    """A running average over some twenty calls."""
    return new if old == 0 else 0.95 * old + 0.05 * new


def batch_sizes(rows: int) -> tuple[int, ...]:
    """Powers of two up to the rows, and the rows.

    >>> batch_sizes(12)
    (1, 2, 4, 8, 12)
    """
    return (*(2**i for i in range(rows.bit_length()) if 2**i < rows), rows)
