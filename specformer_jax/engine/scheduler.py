"""Which requests are on the device: prompts being read, rows that decode, calls not yet read back."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int32

from specformer_jax.engine.active_request import ActiveRequest
from specformer_jax.engine.compiled_steps import CompiledSteps, StepLogprobs, StepReport, prepare
from specformer_jax.engine.prefix_cache import Prefix, PrefixCache
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.planning.planner import Plan

SHRINK_AFTER = 4  # calls that a batch must have been too large before it shrinks


class Reading(NamedTuple):
    """A request whose prompt is being read, or has been read and waits for a row."""

    active: ActiveRequest
    prefix: Prefix


class Call(NamedTuple):
    """A device call whose results have not been read back, and the requests in its rows."""

    rows: tuple[ActiveRequest | None, ...]
    report: StepReport
    logprobs: StepLogprobs
    plan: Plan | None  # None: it read a prompt
    alone: bool  # nothing but this call since the one before


class Outcome(NamedTuple):
    """What one call did, on the host.

    Attributes:
      plan: what the planner chose for the call, or None where it read the end of a prompt.
      rows: the size of the batch.
      alone: whether the device did nothing but this call since the one before: the time between them is its own.
      tokens: how many tokens the call committed.
      sent: how many of them were sent to callers; the others were made after an end that the device did not know of.
      active_requests: the requests in the batch, in the order in which the fields below have them.
      steps: how many passes of the target each request had.
      drafted: how many drafts were verified for each request, by position.
      accepted: how many drafts were accepted for each request, by position.
    """

    plan: Plan | None
    rows: int
    alone: bool
    tokens: int
    sent: int
    active_requests: list[ActiveRequest]
    steps: Int32[np.ndarray, " requests"]
    drafted: Int32[np.ndarray, "requests J"]
    accepted: Int32[np.ndarray, "requests J"]


class Scheduler:
    """The rows of the batch, and the one prompt that is read at a time; nothing is there at first.

    The host is one call behind the device: what a row does after an end that the device does not know of (a stop
    string, a cancellation) is thrown away.
    """

    def __init__(self, lm: LanguageModel, compiled_steps: CompiledSteps, prefixes: int):
        self._lm, self._compiled_steps = lm, compiled_steps
        self._prefixes = PrefixCache(compiled_steps, prefixes)
        self._reading: Reading | None = None
        self._ready: Reading | None = None
        self._calls: collections.deque[Call] = collections.deque()
        self._state = compiled_steps.empty(compiled_steps.sizes[0])
        self._rows: list[ActiveRequest | None] = [None] * compiled_steps.sizes[0]
        self._stops = np.zeros(compiled_steps.sizes[0], bool)  # rows that end before the next step
        self._too_large = 0  # calls since the batch became larger than it need be
        self._alone = False  # nothing was started since the last decode call

    @property
    def in_flight(self) -> list[ActiveRequest]:
        """The requests that are here and have not ended."""
        readings = [reading.active for reading in (self._reading, self._ready) if reading is not None]
        return [a for a in (*self._rows, *readings) if a is not None and not a.finished]

    @property
    def running(self) -> list[ActiveRequest]:
        """The requests that decode."""
        return [a for a in self._rows if a is not None]

    @property
    def size(self) -> int:
        """Rows of the batch, free ones included."""
        return len(self._rows)

    @property
    def busy(self) -> bool:
        """Whether anything is here or still to be read back."""
        return bool(self._calls or self.in_flight)

    def filling(self, waiting: bool) -> bool:
        """Whether a row is free for a prompt that is being read, or for one that waits to be."""
        return (waiting or self._reading is not None) and len(self.running) < self._compiled_steps.sizes[-1]

    @property
    def may_admit(self) -> bool:
        """Whether the next prompt can be read: one may be ready before a row is free, not more."""
        return self._reading is None and self._ready is None

    def admit(self, active: ActiveRequest) -> None:
        """Takes a request whose prompt is to be read next."""
        request = active.request
        prefix, reused = self._prefixes.take(request.prompt_ids)
        prefix.state = prepare(
            prefix.state, request.sampling_params, active.limit, active.draft_cap, request.logprobs is not None
        )
        active.usage = dataclasses.replace(active.usage, cached_tokens=reused)
        self._reading = Reading(active, prefix)

    def sweep(self) -> None:
        """Ends what was cancelled or expired, and frees what has ended."""
        for active in self.in_flight:
            if active.handle.cancelled:
                active.finish("cancelled")
            elif active.expired() and active not in self._rows:  # a row's deadline comes with its next tokens
                active.finish("deadline")
        for row, running in enumerate(self._rows):
            if running is not None and running.finished:
                self._rows[row], self._stops[row] = None, True
        self._reading, self._ready = _unless_finished(self._reading), _unless_finished(self._ready)

    def read_prompt(self) -> bool:
        """Reads one chunk of the prompt that is being read; whether there is one."""
        if self._reading is None:
            return False
        active, prefix = self._reading
        prompt = active.request.prompt_ids
        # The last token of a chunk is read again with the next: only then is the token after it known.
        begin = max(0, len(prefix.tokens) - 1)
        end = min(begin + self._compiled_steps.chunks[-1], len(prompt))
        last = end == len(prompt)
        prefix.state, report, logprobs = self._compiled_steps.read_chunk(prefix.state, prompt[begin:end], begin, last)
        prefix.tokens = np.asarray(prompt[:end], np.int32)
        self._alone = False
        if last:
            self._calls.append(Call((active,), report, logprobs, None, False))
            self._ready, self._reading = self._reading, None
        return True

    def fill(self) -> None:
        """Puts the prompt that is ready into a row, if one is free."""
        if self._ready is None:
            return
        if None not in self._rows:
            larger = [size for size in self._compiled_steps.sizes if size > self.size]
            if not larger:
                return
            self._resize(larger[0])
        active, prefix = self._ready
        row = self._rows.index(None)
        self._state = self._compiled_steps.insert(self._state, prefix.state, row)
        self._rows[row], self._stops[row], self._alone = active, False, False
        prefix.busy = False
        self._ready = None

    def shrink(self) -> None:
        """Moves to the next smaller batch when that has been enough for some calls."""
        smaller = [size for size in self._compiled_steps.sizes if len(self.running) <= size < self.size]
        self._too_large = self._too_large + 1 if smaller and self.may_admit else 0
        if self._too_large > SHRINK_AFTER:
            self._resize(smaller[-1])

    def decode(self, plan: Plan, steps: int) -> None:
        """Starts a few steps of all rows."""
        self._state, report, logprobs = self._compiled_steps.advance(self._state, self._stops, steps, plan.draft_length)
        self._stops = np.zeros(self.size, bool)
        self._calls.append(Call(tuple(self._rows), report, logprobs, plan, self._alone))
        self._alone = True

    def harvest(self, keep: int) -> Iterator[Outcome]:
        """Reads back all calls but the latest `keep`, and sends their tokens."""
        while len(self._calls) > keep:
            yield self._read_back(self._calls.popleft())

    def _read_back(self, call: Call) -> Outcome:
        report = jax.device_get(call.report)
        present = [row for row, a in enumerate(call.rows) if a is not None]
        active_requests = [a for a in call.rows if a is not None]
        unfinished = [(row, a) for row, a in zip(present, active_requests, strict=True) if not a.finished]
        asks_logprobs = any(a.request.logprobs is not None for _, a in unfinished)
        logprobs = jax.device_get(call.logprobs) if asks_logprobs else None
        sent = 0
        for row, active in unfinished:
            before = active.usage.completion_tokens
            active.take(self._lm, report, logprobs, row, prefill=call.plan is None)
            sent += active.usage.completion_tokens - before
        return Outcome(
            call.plan,
            len(call.rows),
            call.alone,
            int(report.added[present].sum()),
            sent,
            active_requests,
            report.steps[present],
            report.drafted[present],
            report.accepted[present],
        )

    def _resize(self, size: int) -> None:
        kept = [row for row, active in enumerate(self._rows) if active is not None]
        self._state = self._compiled_steps.resize(self._state, kept, size)
        self._rows = [self._rows[row] for row in kept] + [None] * (size - len(kept))
        self._stops = np.zeros(size, bool)
        self._too_large, self._alone = 0, False


def _unless_finished(reading: Reading | None) -> Reading | None:
    """The reading, or None when its request has ended; its row is then free for others."""
    if reading is None or not reading.active.finished:
        return reading
    reading.prefix.busy = False
    return None
