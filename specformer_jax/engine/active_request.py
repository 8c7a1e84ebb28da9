"""One request in the engine: the caller's handle on it, and the host's record of its answer."""

from __future__ import annotations

import dataclasses
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32

from specformer_jax.decoding.state import BROKEN, BROKEN_REASON
from specformer_jax.engine.compiled_steps import PromptLogprobs, StepLogprobs, StepReport
from specformer_jax.engine.page_pool import Digest, PagePool
from specformer_jax.engine.request import NOT_NUMBERS, Delta, Request, TokenOutput, Usage
from specformer_jax.engine.stops import FinalText, texts
from specformer_jax.grammars.matcher import CheckedDrafts, Matcher
from specformer_jax.loading.language_model import LanguageModel

log = logging.getLogger(__name__)


class Handle:
    """A submitted request: iterate over it for its deltas, or `subscribe` to them.

    Attributes:
      request: what the caller asks for.
      cancelled: whether `cancel` was called.
    """

    def __init__(self, request: Request, wake: Callable[[], None]):
        self.request = request
        self.cancelled = False
        self._wake = wake
        self._deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._callback: Callable[[Delta], Any] | None = None
        self._ended = False

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        """The next delta, waiting for it; the one with a finish_reason is the last."""
        if self._ended:
            raise StopIteration
        delta = self._deltas.get()
        self._ended = delta.finish_reason is not None
        return delta

    def cancel(self) -> None:
        """Ends the answer soon, with finish_reason "cancelled"; nothing happens if it has ended."""
        self.cancelled = True
        self._wake()

    def subscribe(self, callback: Callable[[Delta], Any]) -> None:
        """Calls back with every delta, those so far at once and later ones on the engine's thread: be quick there.

        A callback that raises cancels the request.
        """
        with self._lock:
            while not self._deltas.empty():
                callback(self._deltas.get())
            self._callback = callback

    def put(self, delta: Delta) -> None:
        """Delivers a delta; the engine calls it."""
        with self._lock:
            if self._callback is None:
                self._deltas.put(delta)
                return
            try:
                self._callback(delta)
            except Exception:
                log.exception("a subscriber failed: its request is cancelled")
                self.cancelled = True


@dataclasses.dataclass(eq=False)
class ActiveRequest:
    """What the host knows of a request in flight.

    Attributes:
      handle: the handle that the caller holds.
      submitted: when the request came, in seconds of `time.monotonic`.
      rank: that, with its priority: of two requests the one with the lower goes first.
      positions: how many tokens prompt and answer may have.
      draft_cap: how many drafts a step of the request may have.
      text: turns the answer's tokens into text.
      usage: what the answer took so far.
      tokens: the prompt and the answer so far.
      row: the row of the batch that it is in, None while it waits.
      arrival: its number among those that entered a row: prompts are read in this order; 0 before it did.
      pages: the pages of the cache that it holds, in the order of its positions.
      read: how many of its tokens are in them, when the calls under way are done, as far as that is known.
      chain: the digests of its full pages, as far as its tokens were known when it entered its row.
      confidence: how sure the drafter was of each of the row's drafts; None where it was not asked for any.
      row_offset: what the row's own record adds to their log odds.
      has_draft: which of them there are.
      matcher: where the answer stands in its grammar, None without one.
      checked: the drafts that the next step verifies and what the grammar allows between them; None without one.
      prompt_logprobs: what is known of the prompt's tokens, where the request asks for it; None before it is read.
      halted: whether the device ended its row at an end token that it ignores.
      finished: whether the last delta has been sent.
    """

    handle: Handle
    submitted: float
    rank: float
    positions: int
    draft_cap: int
    text: FinalText
    usage: Usage
    tokens: list[int]
    row: int | None = None
    arrival: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    read: int = 0
    chain: list[Digest] = dataclasses.field(default_factory=list)
    confidence: Float32[np.ndarray, " J"] | None = None
    row_offset: float = 0.0
    has_draft: Bool[np.ndarray, " J"] | None = None
    matcher: Matcher | None = None
    checked: CheckedDrafts | None = None
    prompt_logprobs: PromptLogprobs | None = None
    halted: bool = False
    finished: bool = False
    _kept: list[Digest] = dataclasses.field(default_factory=list)  # of the pages that others may share
    _place: int = 0  # how many tokens of its pass come before the next token

    @property
    def request(self) -> Request:
        """What the caller asks for."""
        return self.handle.request

    @property
    def unread(self) -> int:
        """How many of its known tokens will not be in the cache then; 1 or none where it decodes."""
        return len(self.tokens) - self.read

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are still to be found."""
        return self.request.prompt_logprobs and self.usage.completion_tokens == 0

    def expired(self) -> bool:
        """Whether its deadline has passed."""
        timeout = self.request.timeout
        return timeout is not None and time.monotonic() - self.submitted > timeout

    def enter(self, row: int, pages: list[int], chain: list[Digest], shared: int, read: int, arrival: int) -> None:
        """It is in a row now, with these pages; the first are shared, and hold `read` of its tokens."""
        if self.arrival == 0:
            queue_time = time.monotonic() - self.submitted
            self.usage = dataclasses.replace(self.usage, cached_tokens=read, queue_time=queue_time)
        self.arrival = arrival
        self.row, self.pages, self.read = row, pages, read
        self.chain, self._kept = chain, chain[:shared]

    def leave(self) -> None:
        """It is in no row any more: its pages are gone, and what was in them is to be read again."""
        self.row, self.pages, self.read = None, [], 0
        self.confidence, self.checked, self.halted, self._place = None, None, False, 0

    def new_full_pages(self, pool: PagePool) -> Iterator[tuple[int, Digest]]:
        """The pages that others may share from now on: full, with the token after them known."""
        full = self.read // pool.page_size
        if full > len(self._kept):
            before = self._kept[-1] if self._kept else b""
            known = self.tokens[: full * pool.page_size + 1]
            for digest in pool.chain(known, len(self._kept), before):
                yield self.pages[len(self._kept)], digest
                self._kept.append(digest)

    def finish(self, reason: str, error: str | None = None) -> None:
        """Sends the last delta, without tokens."""
        self._send((), reason, error)

    def take(self, lm: LanguageModel, report: StepReport, logprobs: StepLogprobs | None, row: int) -> None:
        """Turns what a call added to the row into a delta.

        Args:
          lm: the model, which knows the tokens that end an answer.
          report: what the call added to its rows, on the host.
          logprobs: the log-probabilities of that, on the host; None where no request in the call asks for them.
          row: the row of this request.
        """
        self.read = max(self.read, int(report.read[row]))
        tokens: list[TokenOutput] = []
        reason = None
        prompt = self._prompt(lm) if self.scores_prompt and report.added[row] else ()
        if any(token.logprob is not None and math.isnan(token.logprob) for token in prompt):
            self._send((), "error", NOT_NUMBERS)
            return
        if prompt and not self.request.answers:
            self._send((), "length", prompt=prompt)
            return
        ids = report.tokens[row, : report.added[row]].tolist()
        self.tokens += ids
        self.usage = dataclasses.replace(
            self.usage, drafted_tokens=self.usage.drafted_tokens + int(report.drafted[row].sum())
        )
        for i, token in enumerate(ids):
            if token == BROKEN:
                self._send(tuple(tokens), "error", BROKEN_REASON)
                return
            from_draft = bool(report.from_draft[row, i])
            is_eos = token in lm.config.eos_ids and not self.request.ignore_eos
            ends = is_eos or token in self.request.stop_token_ids
            text = "" if ends else self.text.push(token)
            logprob, top = _score(logprobs, (row, i), self.request.logprobs)
            if logprob is not None and math.isnan(logprob):
                self._send(tuple(tokens), "error", NOT_NUMBERS)
                return
            tokens.append(TokenOutput(token, text, from_draft, logprob, top))
            self._count(from_draft)
            if ends or self.text.stopped:
                reason = "stop"
                break
        if reason is None and report.done[row]:
            self.halted = len(self.tokens) < self.positions
            reason = None if self.halted else "length"
        if reason is None and self.expired():
            reason = "deadline"
        if reason is not None and tokens:
            rest = self.text.finish()  # nothing after a stop string
            tokens[-1] = dataclasses.replace(tokens[-1], text=tokens[-1].text + rest)
        if tokens or reason:
            self._send(tuple(tokens), reason, prompt=prompt)

    def _prompt(self, lm: LanguageModel) -> tuple[TokenOutput, ...]:
        """The prompt's tokens; nothing comes before the first, so it has no log-probability."""
        ids, found = self.request.prompt_ids, self.prompt_logprobs
        pieces = texts(lm.tokenizer, ids, self.request.shown_ids)
        scored = [_score(found if i else None, (i,), self.request.logprobs) for i in range(len(ids))]
        return tuple(TokenOutput(id, text, False, *score) for id, text, score in zip(ids, pieces, scored, strict=True))

    def follow_grammar(
        self, added: Sequence[int], proposed: Int32[np.ndarray, " J"], confidence: Float32[np.ndarray, " J"]
    ) -> None:
        """Goes on in the grammar, and asks it for the next chain; the request ends where that cannot be.

        Args:
          added: the tokens that the answer gained; they do not end it.
          proposed: the drafts that the row has now, -1 for none.
          confidence: how sure the drafter was of them; what the grammar forces is sure.
        """
        assert self.matcher is not None
        try:
            self.matcher.take(added)
            self.checked = self.matcher.check(proposed.tolist(), min(self.draft_cap, len(proposed)))
        except RuntimeError as error:
            self.finish("error", str(error))
            return
        chain = np.full_like(proposed, -1)
        chain[: len(self.checked.drafts)] = self.checked.drafts
        self.confidence = np.where(chain == proposed, confidence, np.float32(1))
        self.has_draft = chain >= 0

    def _count(self, from_draft: bool) -> None:
        """A pass commits accepted drafts and then the target's own token, unless the end cuts it short.

        The first token of all comes from the pass that read the prompt's end, which is no decode pass.
        """
        u = self.usage
        first = u.completion_tokens == 0
        accepted = list(u.accepted_per_position)
        if self._place > 0:
            accepted[self._place - 1] += 1
        self.usage = dataclasses.replace(
            u,
            completion_tokens=u.completion_tokens + 1,
            steps=u.steps + (self._place == 0 and not first),
            accepted_per_position=tuple(accepted),
            time_to_first_token=time.monotonic() - self.submitted if first else u.time_to_first_token,
        )
        self._place = self._place + 1 if from_draft else 0

    def _send(
        self,
        tokens: tuple[TokenOutput, ...],
        reason: str | None,
        error: str | None = None,
        prompt: tuple[TokenOutput, ...] = (),
    ) -> None:
        self.usage = dataclasses.replace(self.usage, seconds=time.monotonic() - self.submitted)
        self.finished = reason is not None
        self.handle.put(Delta(tokens, self.usage, reason, error, prompt))


Score = tuple[float | None, tuple[tuple[int, float], ...]]  # of a token; and the likeliest with theirs


def _score(logprobs: StepLogprobs | PromptLogprobs | None, at: tuple[int, ...], top: int | None) -> Score:
    """What a request reports of the token at a place of these arrays."""
    if logprobs is None or top is None:
        return None, ()
    likeliest = zip(logprobs.top_ids[at][:top], logprobs.top_logprobs[at][:top], strict=True)
    return float(logprobs.chosen[at]), tuple((int(id), float(logprob)) for id, logprob in likeliest)
