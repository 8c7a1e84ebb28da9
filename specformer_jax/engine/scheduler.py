"""Which requests are on the device: rows, the pages they hold, calls not yet read back."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int32

from specformer_jax.engine.active_request import ActiveRequest
from specformer_jax.engine.compiled_steps import CompiledSteps, Control, PromptLogprobs, StepLogprobs, StepReport
from specformer_jax.engine.page_pool import Digest, PagePool
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.nn import cache as cache_lib
from specformer_jax.planning.budgets import NextCall, StepBudget
from specformer_jax.planning.calibration import Calibration
from specformer_jax.planning.planner import Plan, Row


class Call(NamedTuple):
    """A device call whose results have not been read back, and the requests in its rows."""

    rows: dict[int, ActiveRequest]
    report: StepReport
    logprobs: StepLogprobs
    prompts: dict[int, PromptLogprobs]  # of the rows that score theirs, as far as they are read
    plan: Plan | None  # None: it read prompts
    growth: int  # the most tokens that it can add to a row
    drafts: bool  # whether rows were given drafts
    alone: bool  # nothing but this call since the one before


class Outcome(NamedTuple):
    """What one call did, on the host.

    Attributes:
      plan: what the planner chose for the call, or None where it read prompts.
      running: how many requests were in its rows.
      alone: whether the device did nothing but this call since the one before: the time between them is its own.
      tokens: how many tokens the call committed.
      sent: how many of them were sent to callers; the others were made after an end that the device did not know of.
      steps: how many passes of the target the call made, counted once for each row in them.
      drafted: how many drafts were verified, by their place in the chain.
      accepted: how many drafts were accepted, by their place in the chain.
    """

    plan: Plan | None
    running: int
    alone: bool
    tokens: int
    sent: int
    steps: int
    drafted: Int32[np.ndarray, " J"]
    accepted: Int32[np.ndarray, " J"]


class Scheduler:
    """The rows of the batch and the pages of the cache; nothing is there at first.

    The host is one call behind the device: what a row does after an end that the device does not know of (a stop
    string, a cancellation) is thrown away, and each row holds pages for all that the calls under way may add.
    """

    def __init__(self, lm: LanguageModel, compiled_steps: CompiledSteps, calibration: Calibration, shards: int = 1):
        self._lm, self._compiled_steps, self._calibration = lm, compiled_steps, calibration
        rows, share = compiled_steps.shape.rows, compiled_steps.pages // shards
        self._state = compiled_steps.empty()
        self._rows: list[ActiveRequest | None] = [None] * rows
        self._pools = [PagePool(range(i * share, (i + 1) * share), cache_lib.page_size()) for i in range(shards)]
        self._pool_of = [self._pools[row * shards // rows] for row in range(rows)]
        self._calls: collections.deque[Call] = collections.deque()
        self._stops = np.zeros(rows, bool)  # rows that end before the next step
        self._alone = False  # nothing was started since the last call that read no prompt
        self._arrivals = 0

    @property
    def in_flight(self) -> list[ActiveRequest]:
        """The requests that are here and have not ended."""
        return [active for active in self._rows if active is not None and not active.finished]

    @property
    def constrained(self) -> bool:
        """Whether an answer here follows a grammar."""
        return any(active.matcher is not None for active in self.in_flight)

    @property
    def halted(self) -> list[ActiveRequest]:
        """Those that the device ended at an end token which they ignore."""
        return [active for active in self.in_flight if active.halted]

    @property
    def busy(self) -> bool:
        """Whether anything is here or still to be read back."""
        return bool(self._calls or self.in_flight)

    @property
    def unread(self) -> int:
        """How many tokens of prompts have still to be read."""
        return sum(active.unread for active in self.in_flight if active.unread > 1)

    @property
    def seats(self) -> int:
        """How many places the rows take by themselves; where a mesh splits them, each part as many as the fullest."""
        held = collections.Counter(id(self._pool_of[row]) for row, active in enumerate(self._rows) if active)
        return max(held.values(), default=0) * len(self._pools)

    @property
    def free_pages(self) -> int:
        """How many pages no row holds."""
        return sum(pool.free for pool in self._pools)

    def forget_prefixes(self) -> None:
        """Lets later requests find nothing of earlier ones."""
        for pool in self._pools:
            pool.forget()

    def decoding(self) -> list[Row]:
        """The rows whose prompts have been read, as the planner sees them."""
        found = []
        for active in self.in_flight:
            if active.unread <= 1:
                survival = None
                if active.confidence is not None:
                    survival = self._calibration.survival(active.confidence, active.row_offset) * active.has_draft
                found.append(Row(survival, active.draft_cap, len(active.tokens)))
        return found

    def admit(self, active: ActiveRequest) -> bool:
        """Puts a request into a free row.

        Returns:
          False where there is no row, or there are no pages for it, or what it begins with is just being read.
        """
        free = [(row, self._pool_of[row]) for row, held in enumerate(self._rows) if held is None]
        if not free:
            return False
        # Only what is read is scored.
        chain = [] if active.scores_prompt else self._pools[0].chain(active.tokens)
        found = max(len(pool.find(chain)) for pool in self._pools)
        if any(set(chain[found : found + 1]) & set(other.chain) for other in self.in_flight if other.unread > 1):
            return False
        # Where the most of it has been read; then where the most pages are free.
        for row, pool in sorted(free, key=lambda at: (len(at[1].find(chain)), at[1].free), reverse=True):
            if self._enter(active, row, pool, chain):
                break
        else:
            return False
        request = active.request
        self._state = self._compiled_steps.admit(
            self._state,
            row,
            active.tokens,
            prompt=len(request.prompt_ids),
            read=active.read,
            limit=active.positions,
            arrival=active.arrival,
            sampling_params=request.sampling_params,
            asks_logprobs=request.logprobs is not None,
            asks_prompt_logprobs=active.scores_prompt,
            ruled_out=request.ruled_out(self._lm.config.eos_ids),
        )
        self._rows[row], self._stops[row], self._alone = active, False, False
        if active.matcher is not None:
            slots = self._lm.model.max_draft_length
            active.follow_grammar([], np.full(slots, -1, np.int32), np.zeros(slots, np.float32))
        return True

    def _enter(self, active: ActiveRequest, row: int, pool: PagePool, chain: list[Digest]) -> bool:
        """Gives a request a row and its first pages; False where there are too few."""
        shared = pool.find(chain)
        pool.hold(shared)
        wanted = cache_lib.pages_for(min(len(active.tokens) + self._compiled_steps.width, active.positions))
        # A page for each that runs stays free: who comes should not drive out who is there.
        spare = sum(1 for other, held in enumerate(self._rows) if held and self._pool_of[other] is pool)
        pages = None if pool.free - spare < wanted - len(shared) else pool.take(wanted - len(shared))
        if pages is None:
            pool.give_back(shared)
            return False
        self._arrivals += 1
        active.enter(row, [*shared, *pages], chain, len(shared), len(shared) * pool.page_size, self._arrivals)
        return True

    def sweep(self) -> None:
        """Ends what was cancelled or expired, and frees the rows of what has ended."""
        for active in self.in_flight:
            if active.handle.cancelled:
                active.finish("cancelled")
            elif active.expired() and active.unread > 1:  # a decoding row's deadline comes with its next tokens
                active.finish("deadline")
        for held in self._rows:
            if held is not None and held.finished:
                self._release(held)

    def make_room(self, growth: int) -> list[ActiveRequest]:
        """Gives each row pages for so many tokens more; where there are none, the last in rank leaves its row.

        Returns:
          The requests that left; they are to be admitted again. Calls under way must have been read back.
        """
        left: list[ActiveRequest] = []
        for active in sorted(self.in_flight, key=lambda a: a.rank):
            while active.row is not None and not self._grow(active, growth):
                pool = self._pool(active)
                last = max((a for a in self.in_flight if self._pool(a) is pool), key=lambda a: a.rank)
                self._release(last)
                left.append(last)
        return left

    def take_back(self) -> list[ActiveRequest]:
        """Takes the halted out of their rows, to be admitted again. Calls under way must have been read back."""
        halted = self.halted
        for active in halted:
            self._release(active)
        return halted

    def has_room(self, growth: int) -> bool:
        """Whether `make_room` would send nobody away."""
        lacking = dict.fromkeys(self._pools, 0)
        for active in self.in_flight:
            lacking[self._pool(active)] += self._lacking(active, growth)
        return all(count <= pool.free for pool, count in lacking.items())

    def start(self, call: NextCall) -> None:
        """Starts a few steps of all rows."""
        control = self._compiled_steps.control()
        rows = {row: active for row, active in enumerate(self._rows) if active is not None}
        for row, active in rows.items():
            control.draft_cap[row] = min(active.draft_cap, call.draft_cap)
            control.pages[row, : len(active.pages)] = active.pages
        if self.constrained:
            control = self._constrain(control, rows)
        control = control._replace(stop=self._stops, calibration=self._calibration.line.copy())
        self._state, report, logprobs = self._compiled_steps.advance(self._state, control, call.steps, call.budget)
        self._stops = np.zeros(len(self._rows), bool)
        scoring = [row for row, active in rows.items() if active.scores_prompt] if call.budget.chunk else []
        prompts = {row: self._compiled_steps.prompt_logprobs(self._state, row) for row in scoring}
        self._calls.append(
            Call(rows, report, logprobs, prompts, call.plan, call.growth, call.draft_cap > 0, self._alone)
        )
        self._alone = call.plan is not None
        if call.budget.chunk:
            self._note_reading(call.budget)
            for active in rows.values():
                self._keep_full_pages(active)  # whoever reads them comes after this call

    def _constrain(self, control: Control, rows: dict[int, ActiveRequest]) -> Control:
        """With the chains of the rows that follow a grammar."""
        control = control._replace(allowed=np.zeros_like(control.allowed))
        for row, active in rows.items():
            if active.checked is not None:
                drafts, bits = active.checked
                control.constrained[row] = True
                control.allowed[row, : len(bits)] = bits
                control.chain[row, : len(drafts)] = drafts
        return control

    def harvest(self, keep: int) -> Iterator[Outcome]:
        """Reads back all calls but the latest `keep`, and sends their tokens."""
        while len(self._calls) > keep:
            yield self._read_back(self._calls.popleft())

    def _note_reading(self, budget: StepBudget) -> None:
        """Which tokens of prompts the call reads, at least: as `allocate` shares them out."""
        for pool in self._pools:
            rows = [a for a in self.in_flight if self._pool(a) is pool]
            decoding = sum(active.unread <= 1 for active in rows)
            parts = len(self._pools)
            room = min(budget.chunk // parts, budget.size // parts - decoding)
            for active in sorted((a for a in rows if a.unread > 1), key=lambda a: a.arrival):
                taken = min(active.unread, room)
                active.read, room = active.read + taken, room - taken

    def _read_back(self, call: Call) -> Outcome:
        report = jax.device_get(call.report)
        unfinished = [(row, a) for row, a in call.rows.items() if not a.finished and a.row == row]
        asks_logprobs = any(a.request.logprobs is not None for _, a in unfinished)
        logprobs = jax.device_get(call.logprobs) if asks_logprobs else None
        sent = 0
        for row, active in unfinished:
            before = active.usage.completion_tokens
            if row in call.prompts:
                active.prompt_logprobs = jax.device_get(call.prompts[row])
            active.take(self._lm, report, logprobs, row)
            active.confidence = report.confidence[row] if call.drafts else None
            active.row_offset = float(report.row_offset[row])
            active.has_draft = report.drafts[row] >= 0
            if active.matcher is not None and not active.finished:
                added, proposed = report.tokens[row, : report.added[row]], np.asarray(report.drafts[row])
                active.follow_grammar(added.tolist(), proposed, np.asarray(report.confidence[row]))
            sent += active.usage.completion_tokens - before
            self._keep_full_pages(active)
        self._calibration.observe(report.outcomes)
        present = list(call.rows)
        return Outcome(
            call.plan,
            len(present),
            call.alone,
            int(report.added[present].sum()),
            sent,
            int(report.steps[present].sum()),
            report.drafted[present].sum(axis=0),
            report.accepted[present].sum(axis=0),
        )

    def _keep_full_pages(self, active: ActiveRequest) -> None:
        pool = self._pool(active)
        for page, digest in active.new_full_pages(pool):
            pool.keep(page, digest)

    def _lacking(self, active: ActiveRequest, growth: int) -> int:
        """How many pages a row lacks for the calls under way and so many tokens more."""
        ahead = growth + sum(call.growth for call in self._calls if active in call.rows.values())
        positions = min(len(active.tokens) + ahead, active.positions)
        return max(0, cache_lib.pages_for(positions) - len(active.pages))

    def _grow(self, active: ActiveRequest, growth: int) -> bool:
        pages = self._pool(active).take(self._lacking(active, growth))
        active.pages += pages or []
        return pages is not None

    def _release(self, active: ActiveRequest) -> None:
        assert active.row is not None
        self._pool(active).give_back(active.pages)
        self._rows[active.row], self._stops[active.row] = None, True
        active.leave()

    def _pool(self, active: ActiveRequest) -> PagePool:
        assert active.row is not None
        return self._pool_of[active.row]
