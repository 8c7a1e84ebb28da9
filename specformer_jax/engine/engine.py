"""Continuous batching: requests come and go in the rows of one batch that decodes without a pause.

One thread owns the device. Each round of its loop frees what has ended, admits who waits, starts a few steps over all
rows, whatever they need, and only then reads back what the round before made: the device computes while Python looks at
tokens.
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
from specformer_jax.decoding.state import BINS
from specformer_jax.engine.active_request import ActiveRequest, Handle
from specformer_jax.engine.compiled_steps import CompiledSteps
from specformer_jax.engine.config import EngineConfig, StepBudget, step_budgets
from specformer_jax.engine.request import Failed, QueueFull, Request, Stopped, Usage
from specformer_jax.engine.scheduler import Outcome, Scheduler
from specformer_jax.engine.stats import EngineStats
from specformer_jax.engine.step_costs import load_or_measure
from specformer_jax.engine.stops import FinalText
from specformer_jax.errors import UserError, require
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn.mesh import on_mesh
from specformer_jax.nn.sharded_kernels import row_shards
from specformer_jax.planning.calibration import Calibration
from specformer_jax.planning.planner import BudgetPolicy, FixedDrafts, Plan, Planner

log = logging.getLogger(__name__)

AGING = 30.0  # seconds that one level of priority is worth, so that no request waits for ever
CALL_SECONDS = 0.03  # what a call should take at most, where a step takes less: who reads along sees a steady stream


class Engine:
    """Answers requests from any thread; see the module."""

    def __init__(
        self,
        lm: LanguageModel,
        config: EngineConfig = EngineConfig(),
        planner: BudgetPolicy | None = None,
        mesh: Mesh | None = None,
    ):
        """Compiles and warms up every program, then starts the loop.

        Args:
          lm: the model, as `language_model.load` returns it.
          planner: chooses the budget of each call that reads no prompt; None makes a `Planner` with the costs that the
            file `config.costs` holds, or that are measured here and now.
          mesh: the mesh that `lm` was placed on, if any.

        Raises:
          UserError: sizes that the model does not have.
        """
        self.lm, self.config = lm, config
        self.max_context = config.max_context or lm.config.context
        longest = lm.model.max_draft_length
        require(
            (
                self.max_context <= lm.config.context,
                f"max_context {self.max_context} is more than the {lm.config.context} positions of this target",
            ),
        )
        with on_mesh(mesh):
            self._shards = row_shards(config.rows)
        budgets = _budgets(config, longest, min(config.chunk, self.max_context), self._shards)
        positions = config.cache_positions or max(config.rows * self.max_context // 2, self.max_context)
        tables = cache_lib.pages_for(self.max_context)
        # A row alone must always find the pages it needs.
        pages = max(cache_lib.pages_for(positions), tables * self._shards)
        self.compiled_steps = CompiledSteps(
            lm.model,
            lm.params,
            budgets=budgets,
            rows=config.rows,
            context=self.max_context,
            pages=-(-pages // self._shards) * self._shards,
            steps=config.steps_per_call,
        )
        self._mesh = mesh
        self.planner: BudgetPolicy
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
                planner.costs.check([budget.size for budget in self.compiled_steps.budgets])
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
                positions=min(length + request.sampling_params.max_new_tokens, self.max_context),
                draft_cap=asked if isinstance(asked, int) else 0 if asked == "off" else longest,
                text=FinalText(self.lm.tokenizer.stream(request.prompt_ids if request.raw else ()), request.stop),
                usage=Usage(length, accepted_per_position=(0,) * longest),
                tokens=list(request.prompt_ids),
            )
            heapq.heappush(self._queue, self._entry(active))
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
        self._admit()
        worked = bool(scheduler.in_flight)
        if worked:
            budget, plan, steps = self._plan()
            self._make_room(steps)
            if scheduler.in_flight:
                scheduler.start(budget, plan, steps, self.planner.draft_cap)
        for outcome in scheduler.harvest(keep=1 if worked else 0):
            self._count(outcome)

    def _plan(self) -> tuple[StepBudget, Plan | None, int]:
        """What the next call reads, and in how many steps."""
        scheduler, budgets = self._scheduler, self.compiled_steps.budgets
        rows, unread = scheduler.decoding(), scheduler.unread
        seats = scheduler.most_in_a_part * self._shards
        if unread:
            reading = [b for b in budgets if b.chunk and b.size >= seats]
            wanted = seats + min(unread, reading[-1].chunk)
            return next((b for b in reading if b.size >= wanted), reading[-1]), None, 1
        seated = {b.size: b for b in budgets if b.size >= seats}
        decoding = {size: b for size, b in seated.items() if not b.chunk} or seated
        # While others wait, the rows are looked at after every step.
        steps = 1 if self.stats().queued else self.config.steps_per_call
        plan = self.planner.choose(sorted(decoding), rows, explore=steps > 1)
        if isinstance(self.planner, Planner):
            seconds = self.planner.costs.of(plan.size, sum(row.positions for row in rows))
            steps = max(1, min(steps, int(CALL_SECONDS / seconds)))
        self._update(
            chosen_budget=plan.size,
            drafts_per_row=(plan.size - len(rows)) / len(rows) if plan.draft_cap else 0.0,
        )
        return decoding[plan.size], plan, steps

    def _make_room(self, steps: int) -> None:
        """Gives rows the pages they need; where there are too few, the youngest requests go back to the queue."""
        if not self._scheduler.has_room(steps):  # what is under way may end requests, and has to be read back first
            for outcome in self._scheduler.harvest(keep=0):
                self._count(outcome)
            self._scheduler.sweep()
        left = self._scheduler.make_room(steps)
        if not left:
            return
        with self._wake:
            for active in left:
                heapq.heappush(self._queue, self._entry(active))
            self._stats = dataclasses.replace(self._stats, preempted=self._stats.preempted + len(left))

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
        """Puts requests into rows, the first in the queue first, as long as there are rows and pages."""
        while True:
            with self._wake:
                if not self._queue:
                    return
                _, active = self._queue[0]
            try:
                if not self._scheduler.admit(active):
                    return
            except Exception as error:
                with self._wake:
                    heapq.heappop(self._queue)
                active.finish("error", f"{type(error).__name__}: {error}")
                raise
            with self._wake:
                self._queue = [entry for entry in self._queue if entry[1] is not active]
                heapq.heapify(self._queue)
                if active.usage.completion_tokens == 0:
                    self._stats = dataclasses.replace(
                        self._stats,
                        prompt_tokens=self._stats.prompt_tokens + active.usage.prompt_tokens,
                        cached_tokens=self._stats.cached_tokens + active.usage.cached_tokens,
                    )
                self._stats = dataclasses.replace(self._stats, running=len(self._scheduler.in_flight))

    def _count(self, outcome: Outcome) -> None:
        """Notes what a call did, and what the planner expected of it beside what was measured."""
        now = time.monotonic()
        stats = self._stats.count(outcome)
        if outcome.plan is not None and outcome.alone:
            plan, measured = outcome.plan, outcome.tokens / max(now - self._read_at, 1e-9)
            forecast = plan.tokens_per_second
            log.debug(
                "%d rows, %d tokens a step: %.1f tokens/s forecast, %.1f measured",
                outcome.running, plan.size, forecast, measured,
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

    def _make_planner(self) -> BudgetPolicy:
        slots = self.lm.model.max_draft_length
        calibration = Calibration(slots, BINS)
        if slots == 0 or len(self.compiled_steps.budgets) == 1:
            return FixedDrafts(slots, calibration)
        table = load_or_measure(self.compiled_steps, self.config.costs)
        return Planner(table, calibration, slots, self.lm.acceptance)

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self.lm, self.compiled_steps, self.planner.calibration, self._shards)

    def _entry(self, active: ActiveRequest) -> tuple[tuple[float, int], ActiveRequest]:
        """Its place in the queue: by when it came, and priority; who had to leave a row comes before who came later."""
        return (active.submitted + AGING * active.request.priority, next(self._numbers)), active

    def _end(self, active_requests: list[ActiveRequest], reason: str, error: str | None = None) -> None:
        for active in active_requests:
            active.finish(reason, error)

    def _retry_after(self) -> float:
        """Seconds in which a row becomes free, from what the running requests have still to make."""
        rate = max(self._stats.measured_tokens_per_second, 1.0)
        left = [a.positions - len(a.tokens) for a in self._scheduler.in_flight]
        return float(np.clip(min(left, default=1) * max(1, len(left)) / rate, 1, 60))

    def _update(self, **fields: Any) -> None:
        with self._wake:
            self._stats = dataclasses.replace(self._stats, **fields)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()


def _budgets(config: EngineConfig, drafts: int, chunk: int, shards: int) -> list[StepBudget]:
    """The steps that are compiled, in sizes that every part of a split batch can have."""
    if config.budgets is None:
        budgets = step_budgets(config.rows // shards, drafts, max(1, chunk // shards))
        return [StepBudget(size * shards, part * shards) for size, part in budgets]
    size = max(config.budgets)
    require(
        (
            size >= config.rows + 1 and all(budget >= 1 for budget in config.budgets),
            f"budgets {config.budgets} must be numbers of tokens, the largest more than the {config.rows} rows",
        ),
    )
    reading = StepBudget(size, min(chunk, size - config.rows))
    return [*(StepBudget(b, 0) for b in sorted(set(config.budgets)) if b != size), reading]
