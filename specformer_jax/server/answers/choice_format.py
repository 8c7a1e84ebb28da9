"""OpenAI's completions and chat completions: an answer is a list of choices."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from specformer_jax.engine.request import Delta, TokenOutput, Usage
from specformer_jax.loading.tokenizer import Tokenizer
from specformer_jax.server.answers.format import event
from specformer_jax.server.answers.usage import speculation, total_usage
from specformer_jax.server.errors import ApiError


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a client wants to see beside the text.

    Attributes:
      choices: how many choices there are.
      choices_per_prompt: how many of them each prompt has.
      tokens: whether each choice shows its tokens and kappa.
      usage: whether a stream ends with its usage.
      running_usage: whether every chunk of a stream holds the usage so far.
    """

    choices: int = 1
    choices_per_prompt: int = 1
    tokens: bool = False
    usage: bool = False
    running_usage: bool = False


class ChoiceFormat:
    """What `ChatFormat` and `CompletionFormat` have in common; they say how a choice looks.

    Args:
      tokenizer: turns token ids into text.
      model: the name that the client asked for.
      shown: what to show.
    """

    prefix: str
    whole_object: str  # the `object` that an answer says it is
    chunk_object: str  # the `object` that a chunk says it is

    def __init__(self, tokenizer: Tokenizer, model: str, shown: Shown):
        self._tokenizer, self._shown = tokenizer, shown
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._usages = [Usage(0)] * shown.choices

    def whole(self, choices: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        """The whole answer; see `Format`."""
        bodies = []
        for index, deltas in enumerate(choices):
            last = deltas[-1]
            self._usages[index] = last.usage
            tokens = tuple(token for delta in deltas for token in delta.tokens)
            prompt = tuple(token for delta in deltas for token in delta.prompt)
            gained = Delta(tokens, last.usage, last.finish_reason, prompt=prompt)
            bodies.append(self._choice(index, gained, streams=False))
        return self._head | {"object": self.whole_object, "choices": bodies, **self._totals()}

    def opening(self) -> Iterator[str]:
        """The events that begin a stream; see `Format`."""
        for index in range(self._shown.choices):
            if (first := self._first(index)) is not None:
                yield self._chunk([first])

    def gained(self, index: int, delta: Delta) -> Iterator[str]:
        """The event for what a choice gained; see `Format`."""
        self._usages[index] = delta.usage
        choice = self._choice(index, delta, streams=True)
        shown = ("text", "delta", "finish_reason", "logprobs", "specformer")
        if any(choice.get(field) for field in shown):
            yield self._chunk([choice])

    def closing(self) -> Iterator[str]:
        """The events that end a stream; see `Format`."""
        if self._shown.usage:
            yield event(self._head | {"object": self.chunk_object, "choices": [], **self._totals()})
        yield "data: [DONE]\n\n"

    def failed(self, error: ApiError) -> Iterator[str]:
        """The event that ends a broken stream; see `Format`."""
        yield event(error.body())

    def _chunk(self, choices: list[dict]) -> str:
        body = self._head | {"object": self.chunk_object, "choices": choices}
        if self._shown.usage:
            body["usage"] = self._usage() if self._shown.running_usage else None
        return event(body)

    def _totals(self) -> dict[str, Any]:
        """The usage; a single choice has its metrics beside it, as vLLM has them."""
        metrics = _metrics(self._usages[0]) if self._shown.choices == 1 else {}
        return {"usage": self._usage(), **metrics}

    def _usage(self) -> dict[str, Any]:
        return total_usage(self._usages, self._shown.choices_per_prompt)

    def _choice(self, index: int, delta: Delta, *, streams: bool) -> dict[str, Any]:
        """A choice, or what it gained in a stream."""
        listed = (*delta.prompt, *delta.tokens)
        scored = bool(delta.prompt) or (bool(listed) and listed[-1].logprob is not None)
        choice = {
            "index": index,
            "logprobs": self._logprobs(index, listed) if scored else None,
            "finish_reason": delta.finish_reason,
            **self._content(index, delta, streams),
        }
        if delta.finish_reason is not None and self._shown.choices > 1:
            choice |= _metrics(delta.usage)
        if self._shown.tokens:
            tokens = [{"id": token.id, "text": token.text, "drafted": token.from_draft} for token in delta.tokens]
            choice["specformer"] = {"tokens": tokens, "kappa": round(delta.usage.kappa, 4)}
        return choice

    def _first(self, index: int) -> dict[str, Any] | None:
        """The choice that opens a stream, if this kind has one."""
        return None

    def _content(self, index: int, delta: Delta, streams: bool) -> dict[str, Any]:
        """The fields that hold a choice's text, and what they change of its others."""
        raise NotImplementedError

    def _logprobs(self, index: int, tokens: Sequence[TokenOutput]) -> dict[str, Any]:
        raise NotImplementedError


def _metrics(usage: Usage) -> dict[str, Any]:
    drafts = speculation(usage)
    return {} if drafts is None else {"metrics": {"speculative_decoding": drafts}}


class CompletionFormat(ChoiceFormat):
    """/v1/completions; each choice begins with its text of `echoed`, where there are any."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer, model: str, shown: Shown, echoed: Sequence[str] = ()):
        super().__init__(tokenizer, model, shown)
        self._lengths = [0] * shown.choices  # of the texts so far
        self._echoed = dict(enumerate(echoed))

    def _content(self, index: int, delta: Delta, streams: bool) -> dict[str, Any]:
        text = self._echoed.pop(index, "") + "".join(token.text for token in delta.prompt) + delta.text
        self._lengths[index] += len(text)
        return {"text": text}

    def _logprobs(self, index: int, tokens: Sequence[TokenOutput]) -> dict[str, Any]:
        offsets, begin = [], self._lengths[index]
        for token in tokens:
            offsets.append(begin)
            begin += len(token.text)
        return {
            "tokens": [self._tokenizer.token_text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [None if token.logprob is None else self._by_text(token) for token in tokens],
            "text_offset": offsets,
        }

    def _by_text(self, token: TokenOutput) -> dict[str, float | None]:
        """The likeliest tokens, and the chosen one where it is none of them; an entry each."""
        listed: dict[str, float | None] = {}
        chosen = [] if any(id == token.id for id, _ in token.top) else [(token.id, token.logprob)]
        for id, logprob in (*token.top, *chosen):
            text = self._tokenizer.token_text(id)
            listed[text if text not in listed else f"token_id:{id}"] = logprob  # two tokens may be written alike
        return listed
