"""Continuous batching: requests come and go in the rows of one batch that decodes without a pause.

One thread owns the device. Each round of its loop frees what has ended, reads a chunk of a prompt (or a few), starts a
few decode steps, and only then reads back what the round before made: the device computes while Python looks at tokens.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import logging
import threading
import time
from typing import Any

import numpy as np
from jax.sharding import Mesh

from specformer_jax.batch import generation
from specformer_jax.decoding.logprobs import MAX_TOP
from specformer_jax.engine.active_request import ActiveRequest, Handle
from specformer_jax.engine.compiled_steps import CompiledSteps
from specformer_jax.engine.config import EngineConfig, batch_sizes
from specformer_jax.engine.request import Failed, QueueFull, Request, Stopped, Usage
from specformer_jax.engine.scheduler import Outcome, Scheduler
from specformer_jax.engine.stats import EngineStats
from specformer_jax.engine.step_costs import load_or_measure
from specformer_jax.engine.stops import FinalText
from specformer_jax.errors import UserError, require
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.nn.mesh import on_mesh
from specformer_jax.planning.planner import (
    REQUEST_MEMORY,
    AcceptanceCounts,
    DraftLengthPolicy,
    FixedDraftLength,
    Planner,
)

log = logging.getLogger(__name__)

AGING = 30.0  # seconds that one level of priority is worth, so that no request waits for ever


class Engine:
    """Answers requests from any thread; see the module."""

    def __init__(
        self,
        lm: LanguageModel,
        config: EngineConfig = EngineConfig(),
        planner: DraftLengthPolicy | None = None,
        mesh: Mesh | None = None,
    ):
        """Compiles and warms up every program, then starts the loop.

        Args:
          lm: the model, as `language_model.load` returns it.
          planner: chooses k before each decode call; None makes a `Planner` with the costs that the file `config.costs`
            holds, or that are measured here and now.
          mesh: the mesh that `lm` was placed on, if any.

        Raises:
          UserError: sizes that the model does not have.
        """
        self.lm, self.config = lm, config
        self.max_context = config.max_context or lm.config.context
        longest = lm.model.max_draft_length
        lengths = range(longest + 1) if config.draft_lengths is None else sorted({0, *config.draft_lengths})
        require(
            (
                self.max_context <= lm.config.context,
                f"max_context {self.max_context} is more than the {lm.config.context} positions of this target",
            ),
            (lengths[-1] <= longest, f"draft length {lengths[-1]} is more than the head's {longest} slots"),
        )
        chunk = min(config.chunk, self.max_context)
        self.compiled_steps = CompiledSteps(
            lm.model,
            lm.params,
            sizes=batch_sizes(config.rows) if config.elastic else (config.rows,),
            chunks=sorted({max(16, chunk // 4), max(16, chunk // 2), chunk}),  # a short end costs less
            draft_lengths=lengths,
            context=self.max_context,
            steps=config.steps_per_call,
        )
        self._mesh = mesh
        self.planner: DraftLengthPolicy
        self._wake = threading.Condition()
        self._queue: list[tuple[tuple[float, int], ActiveRequest]] = []
        self._numbers = itertools.count()
        self._stop_at: float | None = None
        self._read_at = 0.0  # when the latest call was read back
        self._stats = EngineStats(rows=config.rows, accepted_per_position=(0,) * longest)
        with on_mesh(self._mesh):
            self.compiled_steps.warm_up(log.info)
            self.planner = planner or self._make_planner()
            if isinstance(planner, Planner):
                planner.costs.check(self.compiled_steps.sizes)
            self._scheduler = self._new_scheduler()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        """Queues a request, from any thread.

        Raises:
          UserError: this engine cannot take the prompt, or so many drafts.
          QueueFull: as many requests wait as may.
          Stopped: the engine takes no more requests.
        """
        self._check(request)
        length, longest = len(request.prompt_ids), self.lm.model.max_draft_length
        asked, now = request.speculative, time.monotonic()
        with self._wake:
            if not self._stats.healthy:
                raise Failed("the engine could not go on after a failure: see its log, and start it anew")
            if self._stop_at is not None:
                raise Stopped("the engine is shutting down and takes no new requests")
            if len(self._queue) >= self.config.max_queue:
                raise QueueFull(self._retry_after())
            active = ActiveRequest(
                Handle(request, self._notify),
                submitted=now,
                limit=min(request.sampling_params.max_new_tokens, self.max_context - length),
                draft_cap=asked if isinstance(asked, int) else 0 if asked == "off" else longest,
                text=FinalText(self.lm.tokenizer.stream(request.prompt_ids if request.raw else ()), request.stop),
                usage=Usage(length, accepted_per_position=(0,) * longest),
                acceptance=AcceptanceCounts(self.lm.model.max_draft_length, REQUEST_MEMORY),
            )
            heapq.heappush(self._queue, ((now + AGING * request.priority, next(self._numbers)), active))
            self._wake.notify()
        return active.handle

    def stats(self) -> EngineStats:
        """The statistics of this moment; any thread may ask."""
        with self._wake:
            return dataclasses.replace(self._stats, queued=len(self._queue))

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Takes no more requests, lets the others finish for so long, cancels the rest and ends the thread.

        Of several calls the one that waits least counts.
        """
        with self._wake:
            until = time.monotonic() + drain_seconds
            self._stop_at = until if self._stop_at is None else min(self._stop_at, until)
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _check(self, request: Request) -> None:
        if reason := generation.too_long(len(request.prompt_ids), self.max_context):
            raise UserError(reason)
        vocab_size = self.lm.config.vocab_size
        kept = min(MAX_TOP, vocab_size)
        require(
            (
                all(0 <= token < vocab_size for token in request.prompt_ids),
                f"a token of the prompt is not within the vocabulary of {vocab_size}",
            ),
            (
                request.logprobs is None or request.logprobs <= kept,
                f"logprobs {request.logprobs} is more than the {kept} that are kept",
            ),
            (
                self.lm.model.truncation or not request.sampling_params.truncates,
                "top-k, top-p and min-p are not compiled into this engine's model: load one that has them",
            ),
        )
        if isinstance(request.speculative, int):
            generation.check_draft_length(self.lm, request.speculative)

    # From here on: the engine's own thread.

    def _run(self) -> None:
        with on_mesh(self._mesh):
            while self._wait():
                try:
                    self._round()
                except Exception as error:
                    log.exception("a step failed: the requests in flight are given up")
                    self._recover(f"{type(error).__name__}: {error}")
                self._update(running=len(self._scheduler.in_flight))
            reason = ("cancelled",) if self._stats.healthy else ("error", "the engine could not go on after a failure")
            self._end(self._scheduler.in_flight, *reason)
            with self._wake:
                waiting, self._queue = self._queue, []
            self._end([active for _, active in waiting], *reason)
            self._update(running=0)

    def _wait(self) -> bool:
        """Waits for something to do; False when the loop is to end."""
        with self._wake:
            while self._stats.healthy and not self._queue and not self._scheduler.busy:
                if self._stop_at is not None:
                    return False
                self._wake.wait()
            return self._stats.healthy and (self._stop_at is None or time.monotonic() < self._stop_at)

    def _round(self) -> None:
        """One turn of the loop; see the module."""
        scheduler = self._scheduler
        self._sweep_queue()
        scheduler.sweep()
        scheduler.fill()
        worked = False
        for _ in range(self.config.chunks_per_call):
            if scheduler.may_admit:
                self._admit()
            worked |= scheduler.read_prompt()
            scheduler.fill()
        if scheduler.running:
            scheduler.shrink()
            # While rows are being filled, the prompts that wait come first.
            steps = 1 if scheduler.filling(self.stats().queued > 0) else self.config.steps_per_call
            rows = [(active.acceptance, active.draft_cap) for active in scheduler.running]
            plan = self.planner.choose(scheduler.size, rows, explore=steps > 1)
            # A planner made elsewhere may think of drafts that are not compiled here.
            compiled = max(k for k in self.compiled_steps.draft_lengths if k <= plan.draft_length)
            scheduler.decode(plan._replace(draft_length=compiled), steps)
            self._update(chosen_draft_length=compiled)
            worked = True
        for outcome in scheduler.harvest(keep=1 if worked else 0):
            self._count(outcome)

    def _sweep_queue(self) -> None:
        """Ends what was cancelled or expired before it was admitted."""
        with self._wake:
            over = [a for _, a in self._queue if a.handle.cancelled or a.expired()]
            if over:
                self._queue = [entry for entry in self._queue if entry[1] not in over]
                heapq.heapify(self._queue)
        for active in over:
            active.finish("cancelled" if active.handle.cancelled else "deadline")

    def _admit(self) -> None:
        with self._wake:
            if not self._queue:
                return
            _, active = heapq.heappop(self._queue)
            self._stats = dataclasses.replace(self._stats, running=self._stats.running + 1)
        try:
            self._scheduler.admit(active)
        except Exception as error:
            active.finish("error", f"{type(error).__name__}: {error}")
            raise
        usage = active.usage
        self._update(
            prompt_tokens=self._stats.prompt_tokens + usage.prompt_tokens,
            cached_tokens=self._stats.cached_tokens + usage.cached_tokens,
        )

    def _count(self, outcome: Outcome) -> None:
        """Learns from a call, and notes what the planner expected of it beside what was measured."""
        for active, drafted, accepted in zip(outcome.active_requests, outcome.drafted, outcome.accepted, strict=True):
            self.planner.observe(active.acceptance, drafted, accepted)
        now = time.monotonic()
        stats = self._stats.count(outcome)
        if outcome.plan is not None and outcome.alone:
            plan, measured = outcome.plan, outcome.tokens / max(now - self._read_at, 1e-9)
            forecast = plan.tokens_per_second
            log.debug(
                "%d rows, k %d: %.1f tokens/s forecast, %.1f measured",
                outcome.rows, plan.draft_length, forecast, measured,
            )  # fmt: skip
            stats = stats.compare(forecast, measured)
        self._read_at = now
        with self._wake:
            self._stats = stats

    def _recover(self, error: str) -> None:
        """Fails what is in flight and starts over with empty rows; where that fails too the engine ends."""
        self._end(self._scheduler.in_flight, "error", error)
        try:
            self._scheduler = self._new_scheduler()
        except Exception:
            log.exception("the engine cannot start over: it ends")
            self._update(healthy=False)

    def _make_planner(self) -> DraftLengthPolicy:
        if len(self.compiled_steps.draft_lengths) == 1:
            return FixedDraftLength(0)
        table = load_or_measure(self.compiled_steps, self.config.costs)
        return Planner(table, self.lm.model.max_draft_length, self.lm.acceptance)

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self.lm, self.compiled_steps, self.config.prefixes)

    def _end(self, active_requests: list[ActiveRequest], reason: str, error: str | None = None) -> None:
        for active in active_requests:
            active.finish(reason, error)

    def _retry_after(self) -> float:
        """Seconds in which a row becomes free, from what the running requests have still to make."""
        rate = max(self._stats.measured_tokens_per_second, 1.0)
        left = [a.limit - a.usage.completion_tokens for a in self._scheduler.in_flight]
        return float(np.clip(min(left, default=1) * max(1, len(left)) / rate, 1, 60))

    def _update(self, **fields: Any) -> None:
        with self._wake:
            self._stats = dataclasses.replace(self._stats, **fields)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()
