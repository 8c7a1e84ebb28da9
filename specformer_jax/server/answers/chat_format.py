"""OpenAI's chat completions: a choice is a message, with what it thought and what it calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specformer_jax.engine.request import Delta, TokenOutput
from specformer_jax.loading.tokenizer import Tokenizer
from specformer_jax.server.answers.choice_format import ChoiceFormat, Shown
from specformer_jax.server.answers.choice_reader import ChoiceReader, new_call_id
from specformer_jax.server.parsing.reader import CallArguments, CallBegin, Piece, Said, Thought


class ChatFormat(ChoiceFormat):
    """/v1/chat/completions.

    Args:
      tokenizer, model, shown: as for `ChoiceFormat`.
      readers: read the choices.
    """

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, model: str, shown: Shown, readers: Sequence[ChoiceReader]):
        super().__init__(tokenizer, model, shown)
        self._readers = readers

    def _first(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _content(self, index: int, delta: Delta, streams: bool) -> dict[str, Any]:
        reader, calls = self._readers[index], self._readers[index].calls
        pieces = reader.read(delta)
        end = {"finish_reason": reader.finish_reason(delta)}
        said = "".join(piece.text for piece in pieces if isinstance(piece, Said))
        thought = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
        more: dict[str, Any] = {"reasoning_content": thought} if thought else {}
        if streams:
            if called := _called(pieces, calls):
                more["tool_calls"] = called
            return {"delta": ({"content": said} if said else {}) | more} | end
        if called := _called(pieces, 0):
            more["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in called]
        content = said if said or not called else None
        return {"message": {"role": "assistant", "content": content, "refusal": None} | more} | end

    def _logprobs(self, index: int, tokens: Sequence[TokenOutput]) -> dict[str, Any]:
        content = [
            self._scored(token.id, token.logprob) | {"top_logprobs": [self._scored(i, p) for i, p in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _scored(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        spelled = list(self._tokenizer.token_bytes(token_id))
        return {"token": self._tokenizer.token_text(token_id), "logprob": logprob, "bytes": spelled or None}


def _called(pieces: Sequence[Piece], before: int) -> list[dict[str, Any]]:
    """What was gained of calls, an entry a call as OpenAI streams them: the first of a call has its id and its name.

    Args:
      pieces: what a choice gained.
      before: how many calls it had begun before.
    """
    entries: list[dict[str, Any]] = []
    index = before - 1
    for piece in pieces:
        if isinstance(piece, CallBegin):
            index += 1
            function = {"name": piece.name, "arguments": ""}
            entries.append({"index": index, "id": new_call_id(), "type": "function", "function": function})
        elif isinstance(piece, CallArguments):
            if not entries:
                entries.append({"index": index, "function": {"arguments": ""}})
            entries[-1]["function"]["arguments"] += piece.text
    return entries
