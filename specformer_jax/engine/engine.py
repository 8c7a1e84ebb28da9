"""Continuous batching: requests come and go in the rows of one batch that decodes without a pause.

One thread owns the device. Each round of its loop frees what has ended, admits who waits, starts a few steps over all
rows, whatever they need, and only then reads back what the round before made: the device computes while Python looks at
tokens.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from typing import Any

import numpy as np
from jax.sharding import Mesh

from specformer_jax.decoding.program_store import ProgramStore
from specformer_jax.engine.active_request import ActiveRequest, Handle
from specformer_jax.engine.compiled_steps import CompiledSteps
from specformer_jax.engine.config import EngineConfig
from specformer_jax.engine.request import Failed, QueueFull, Request, Stopped, Usage, check_request
from specformer_jax.engine.scheduler import Outcome, Scheduler
from specformer_jax.engine.stats import EngineStats
from specformer_jax.engine.step_costs import make_planner
from specformer_jax.engine.stops import FinalText
from specformer_jax.errors import require
from specformer_jax.grammars.matcher import Matchers
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn.mesh import on_mesh
from specformer_jax.nn.sharded_kernels import row_shards
from specformer_jax.planning.budgets import next_call, split_budgets
from specformer_jax.planning.planner import BudgetPolicy, Planner

log = logging.getLogger(__name__)

AGING = 30.0  # seconds that one level of priority is worth, so that no request waits for ever


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
          UserError: sizes that the model does not have, or a verification other than the exact one.
        """
        lm.model.verification.require_exact("the engine")
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
            shards = self._shards = row_shards(config.rows)
        chunk = min(config.chunk, self.max_context)
        budgets = split_budgets(config.budgets, rows=config.rows, drafts=longest, chunk=chunk, shards=shards)
        positions = config.cache_positions or config.rows * self.max_context // 2
        # A row alone must always find the pages it needs.
        pages = max(cache_lib.pages_for(positions), cache_lib.pages_for(self.max_context) * shards)
        store = ProgramStore(config.programs) if config.programs else None
        self.compiled_steps = CompiledSteps(
            lm.model,
            lm.params,
            budgets=budgets,
            rows=config.rows,
            context=self.max_context,
            pages=-(-pages // shards) * shards,
            steps=config.steps_per_call,
            store=store,
        )
        self._matchers = Matchers(lm, config.forced_drafts)
        self._mesh = mesh
        self.planner: BudgetPolicy
        self._wake = threading.Condition()
        self._queue: list[ActiveRequest] = []  # any thread adds, the engine's own takes; by rank
        self._stop_at: float | None = None
        self._forgets = False  # what is kept of earlier requests, before the next is admitted
        self._read_at = 0.0  # when the latest call was read back
        pages = self.compiled_steps.pages
        self._stats = EngineStats(config.rows, pages, free_pages=pages, accepted_per_position=(0,) * longest)
        with on_mesh(self._mesh):
            self.compiled_steps.warm_up(log.info)
            self.planner = planner or make_planner(self.compiled_steps, config.costs, lm.acceptance, store)
            if isinstance(planner, Planner):
                planner.costs.check([budget.size for budget in self.compiled_steps.budgets])
            self._scheduler = self._new_scheduler()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        """Queues a request, from any thread.

        Raises:
          UserError: this engine cannot take the prompt, or so many drafts, or follow the grammar.
          QueueFull: as many requests wait as may.
          Stopped: the engine takes no more requests.
        """
        check_request(request, self.lm, self.max_context)
        matcher = None if request.grammar is None else self._matchers.of(request.grammar, request.thoughts)
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
                rank=now + AGING * request.priority,
                positions=min(length + request.sampling_params.max_new_tokens, self.max_context),
                draft_cap=asked if isinstance(asked, int) else 0 if asked == "off" else longest,
                text=FinalText(self.lm.tokenizer.stream(request.continued, request.shown_ids), request.stop),
                usage=Usage(length, accepted_per_position=(0,) * longest),
                tokens=list(request.prompt_ids),
                matcher=matcher,
            )
            self._queue.append(active)
            self._wake.notify()
        return active.handle

    def learn(self, grammar: str) -> None:
        """Reads a grammar, which may take a while, so that `submit` finds it read.

        Raises:
          UserError: as `submit`.
        """
        self._matchers.of(grammar)

    def reset_prefix_cache(self) -> None:
        """Forgets what is kept of earlier requests: later ones read their prompts anew."""
        with self._wake:
            self._forgets = True

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

    # From here on: the engine's own thread.

    def _run(self) -> None:
        with on_mesh(self._mesh):
            while self._wait():
                try:
                    self._round()
                except Exception as error:
                    log.exception("a step failed: the requests in flight are given up")
                    self._recover(f"{type(error).__name__}: {error}")
                self._update(running=len(self._scheduler.in_flight), free_pages=self._scheduler.free_pages)
            reason = ("cancelled",) if self._stats.healthy else ("error", "the engine could not go on after a failure")
            self._end(self._scheduler.in_flight, *reason)
            with self._wake:
                waiting, self._queue = self._queue, []
            self._end(waiting, *reason)
            self._update(running=0, free_pages=self._stats.pages)

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
        with self._wake:
            forgets, self._forgets = self._forgets, False
        if forgets:
            scheduler.forget_prefixes()
        self._admit()
        worked = bool(scheduler.in_flight)
        if worked:
            self._start()
        self._harvest(keep=1 if worked else 0)
        scheduler.sweep()

    def _harvest(self, keep: int) -> None:
        """Reads back all calls but the latest `keep`."""
        for outcome in self._scheduler.harvest(keep):
            self._count(outcome)

    def _start(self) -> None:
        """Starts a call for the rows that are there."""
        scheduler = self._scheduler
        if scheduler.constrained:  # what a grammar allows follows from the tokens before
            self._harvest(keep=0)
            scheduler.sweep()
            if not scheduler.in_flight:
                return
        rows = scheduler.decoding()
        call = next_call(
            self.compiled_steps.budgets,
            self.planner,
            seats=scheduler.seats,
            unread=scheduler.unread,
            rows=rows,
            # While others wait, or a grammar is followed, the rows are looked at after every step.
            steps=1 if self._queue or scheduler.constrained else self.config.steps_per_call,
            steady=any(active.request.streams for active in scheduler.in_flight),
        )
        if call.plan is not None:
            drafts = call.budget.size - len(rows) if call.plan.draft_cap else 0
            self._update(chosen_budget=call.budget.size, drafts_per_row=drafts / len(rows))
        self._make_room(call.growth)
        if scheduler.in_flight:
            scheduler.start(call)

    def _make_room(self, growth: int) -> None:
        """Gives rows the pages they need; where there are too few, the youngest requests go back to the queue, and so
        does what the device ended too early.
        """
        scheduler = self._scheduler
        if scheduler.halted or not scheduler.has_room(growth):  # what is under way may end requests: it is read first
            self._harvest(keep=0)
            scheduler.sweep()
        halted, left = scheduler.take_back(), scheduler.make_room(growth)
        with self._wake:
            self._queue += halted + left
        self._update(preempted=self._stats.preempted + len(left))

    def _sweep_queue(self) -> None:
        """Ends what was cancelled or expired before it was admitted."""
        with self._wake:
            over = [active for active in self._queue if active.handle.cancelled or active.expired()]
            self._queue = [active for active in self._queue if active not in over]
        for active in over:
            active.finish("cancelled" if active.handle.cancelled else "deadline")

    def _admit(self) -> None:
        """Puts requests into rows, the lowest rank first, as long as there are rows and pages."""
        while self._queue:
            with self._wake:
                active = min(self._queue, key=lambda active: active.rank)
            new = active.arrival == 0
            try:
                if not self._scheduler.admit(active):
                    return
            except Exception as error:
                active.finish("error", f"{type(error).__name__}: {error}")
                raise
            finally:
                if active.row is not None or active.finished:
                    with self._wake:
                        self._queue.remove(active)
            self._update(
                running=len(self._scheduler.in_flight),
                prompt_tokens=self._stats.prompt_tokens + new * active.usage.prompt_tokens,
                cached_tokens=self._stats.cached_tokens + new * active.usage.cached_tokens,
            )

    def _count(self, outcome: Outcome) -> None:
        """Notes what a call did."""
        now = time.monotonic()
        stats = self._stats.count(outcome, now - self._read_at)
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

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self.lm, self.compiled_steps, self.planner.calibration, self._shards)

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
