"""Anthropic's messages: an answer is a list of blocks, and its stream tells how each of them grows."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from specformer_jax.engine.request import Delta, Usage
from specformer_jax.server.answers.choice_reader import ChoiceReader, new_call_id
from specformer_jax.server.answers.format import event
from specformer_jax.server.errors import ApiError
from specformer_jax.server.parsing.reader import CallArguments, CallBegin, Piece, Said, Thought

_FIELDS = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}  # what grows of a block


class MessagesFormat:
    """/v1/messages; see `Format`."""

    def __init__(self, model: str, prompt_tokens: int, reader: ChoiceReader):
        self._reader = reader
        self._blocks: list[dict[str, Any]] = []
        self._is_open = False
        self._usage = Usage(prompt_tokens)
        self._reason: str | None = None
        self._head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}

    def whole(self, choices: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        """The whole answer."""
        for delta in choices[0]:
            for _ in self.gained(0, delta):
                pass
        return self._message()

    def opening(self) -> Iterator[str]:
        """The answer is there, and empty."""
        yield self._event("message_start", {"message": self._message()})

    def gained(self, index: int, delta: Delta) -> Iterator[str]:
        """How its blocks grew."""
        for piece in self._reader.read(delta):
            if not self._continues(piece):
                yield from self._close()
                yield self._open(piece)
            if not isinstance(piece, CallBegin):
                yield self._grow(piece)
        self._usage, self._reason = delta.usage, self._reader.finish_reason(delta)
        if delta.finish_reason is not None:
            yield from self._close()

    def closing(self) -> Iterator[str]:
        """Why it ended, and what it took."""
        message = self._message()
        delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
        yield self._event("message_delta", {"delta": delta, "usage": message["usage"]})
        yield self._event("message_stop", {})

    def failed(self, error: ApiError) -> Iterator[str]:
        """What went wrong."""
        yield self._event("error", error.body())

    def _event(self, name: str, body: dict[str, Any]) -> str:
        return event({"type": name} | body, name)

    def _message(self) -> dict[str, Any]:
        usage, reasons = self._usage, {None: None, "length": "max_tokens", "tool_calls": "tool_use"}
        return self._head | {
            "content": [_shown(block) for block in self._blocks],
            "stop_reason": reasons.get(self._reason, "end_turn"),
            "stop_sequence": None,
            "usage": {
                "input_tokens": usage.prompt_tokens - usage.cached_tokens,
                "cache_read_input_tokens": usage.cached_tokens,
                "cache_creation_input_tokens": 0,
                "output_tokens": usage.completion_tokens,
            },
        }

    def _continues(self, piece: Piece) -> bool:
        """Whether a piece is part of the latest block."""
        kind = self._blocks[-1]["type"] if self._blocks else None
        return kind == {Said: "text", Thought: "thinking", CallArguments: "tool_use"}.get(type(piece))

    def _open(self, piece: Piece) -> str:
        match piece:
            case CallBegin():
                block = {"type": "tool_use", "id": new_call_id(), "name": piece.name, "input": ""}
            case Thought():
                block = {"type": "thinking", "thinking": "", "signature": ""}
            case _:
                block = {"type": "text", "text": ""}
        self._blocks.append(block)
        self._is_open = True
        return self._event("content_block_start", self._place() | {"content_block": _shown(block)})

    def _grow(self, piece: Said | Thought | CallArguments) -> str:
        block = self._blocks[-1]
        block["input" if block["type"] == "tool_use" else block["type"]] += piece.text
        kind = "input_json_delta" if block["type"] == "tool_use" else f"{block['type']}_delta"
        delta = {"type": kind, _FIELDS[block["type"]]: piece.text}
        return self._event("content_block_delta", self._place() | {"delta": delta})

    def _close(self) -> Iterator[str]:
        if self._is_open:
            yield self._event("content_block_stop", self._place())
        self._is_open = False

    def _place(self) -> dict[str, Any]:
        return {"index": len(self._blocks) - 1}


def _shown(block: dict[str, Any]) -> dict[str, Any]:
    """A block as it is sent: a call's arguments as an object, empty where they are not whole."""
    if block["type"] != "tool_use":
        return dict(block)
    try:
        arguments = json.loads(block["input"] or "{}")
    except ValueError:
        arguments = {}
    return block | {"input": arguments}
