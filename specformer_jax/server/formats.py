"""What clients get: OpenAI's objects for whole answers and for chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from specformer_jax.decoding.pass_counts import PassCounts
from specformer_jax.engine.request import TokenOutput, Usage
from specformer_jax.loading.tokenizer import Tokenizer


class Format:
    """The objects of one answer; `ChatFormat` and `CompletionFormat` say how a choice looks.

    Args:
      tokenizer: turns token ids into text.
      model: the name that the client asked for.
      return_tokens: whether each choice shows its tokens and kappa.
    """

    prefix: str
    whole: str  # the `object` that an answer says it is
    part: str  # the `object` that a chunk says it is

    def __init__(self, tokenizer: Tokenizer, model: str, return_tokens: bool):
        self._tokenizer = tokenizer
        self._return_tokens = return_tokens
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def answer(self, choices: list[dict], usage: dict) -> dict[str, Any]:
        """The whole answer."""
        return self._head | {"object": self.whole, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict]) -> dict[str, Any]:
        """A part of a stream."""
        return self._head | {"object": self.part, "choices": choices}

    def choice(
        self, index: int, tokens: Sequence[TokenOutput], usage: Usage, finish_reason: str | None, before: int | None
    ) -> dict[str, Any]:
        """One choice, or what it gained.

        Args:
          index: which choice it is, from 0.
          tokens: all tokens of the answer, or the new ones.
          usage: what the choice took so far.
          finish_reason: why the choice ended; None while it goes on.
          before: how many characters of a stream's text come before these tokens; None for a whole answer.
        """
        text = "".join(token.text for token in tokens)
        scored = bool(tokens) and tokens[0].logprob is not None
        choice = {
            "index": index,
            **self._content(text, before is not None),
            "logprobs": self._logprobs(tokens, before or 0) if scored else None,
            "finish_reason": finish_reason,
        }
        if self._return_tokens:
            shown = [{"id": token.id, "text": token.text, "drafted": token.from_draft} for token in tokens]
            choice["specformer"] = {"tokens": shown, "kappa": round(usage.kappa, 4)}
        return choice

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice that opens a stream, if this kind has one."""
        return None

    def _content(self, text: str, streaming: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[TokenOutput], begin: int) -> dict[str, Any]:
        raise NotImplementedError


class CompletionFormat(Format):
    """/v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str, streaming: bool) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, tokens: Sequence[TokenOutput], begin: int) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(begin)
            begin += len(token.text)
        return {
            "tokens": [self._tokenizer.token_text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._by_text(token) for token in tokens],
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


class ChatFormat(Format):
    """/v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _content(self, text: str, streaming: bool) -> dict[str, Any]:
        if streaming:
            return {"delta": {"content": text} if text else {}}
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, tokens: Sequence[TokenOutput], begin: int) -> dict[str, Any]:
        content = [
            self._scored(token.id, token.logprob) | {"top_logprobs": [self._scored(i, p) for i, p in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _scored(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        spelled = list(self._tokenizer.token_bytes(token_id))
        return {"token": self._tokenizer.token_text(token_id), "logprob": logprob, "bytes": spelled or None}


def total_usage(usages: Sequence[Usage], choices_per_prompt: int) -> dict[str, Any]:
    """OpenAI's usage of an answer, with what speculation did.

    Args:
      usages: what each choice took, the choices of a prompt one after the other; a prompt's tokens count once.
      choices_per_prompt: how many choices each prompt has.
    """
    firsts = usages[::choices_per_prompt]
    prompt, completion = sum(u.prompt_tokens for u in firsts), sum(u.completion_tokens for u in usages)
    passes = PassCounts.total([u.passes for u in usages])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in firsts)},
        "kappa": round(passes.kappa, 4),
        "steps": passes.steps,
        "drafted_tokens": sum(u.drafted_tokens for u in usages),
        "accepted_tokens": int(passes.accepted.sum()),
        "accepted_per_position": passes.accepted.tolist(),
    }
