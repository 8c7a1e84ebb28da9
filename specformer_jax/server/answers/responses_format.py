"""OpenAI's Responses: an answer is a list of items, and its stream tells how each of them grows."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from specformer_jax.engine.request import Delta, Usage
from specformer_jax.server.answers.choice_reader import ChoiceReader, new_call_id
from specformer_jax.server.answers.format import event
from specformer_jax.server.answers.usage import speculation
from specformer_jax.server.errors import ApiError
from specformer_jax.server.parsing.reader import CallArguments, CallBegin, Piece, Said, Thought
from specformer_jax.server.protocol.responses import ResponsesRequest

Told = tuple[str, dict[str, Any]]  # an event's name and what it holds


class ResponsesFormat:
    """/v1/responses; see `Format`."""

    def __init__(self, body: ResponsesRequest, reader: ChoiceReader):
        self._reader = reader
        self._items: list[dict[str, Any]] = []
        self._usage = Usage(0)
        self._reason: str | None = None
        self._number = 0  # of the next event
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model,
            "background": False,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": body.reasoning.model_dump(),
            "store": False,
            "temperature": body.temperature,
            "text": body.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools],
            "top_p": body.top_p,
            "truncation": "disabled",
        }

    def whole(self, choices: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        """The whole answer."""
        for delta in choices[0]:
            for _ in self._gain(delta):
                pass
        return self._response()

    def opening(self) -> Iterator[str]:
        """The answer is there, and empty."""
        yield self._event("response.created", {"response": self._response()})
        yield self._event("response.in_progress", {"response": self._response()})

    def gained(self, index: int, delta: Delta) -> Iterator[str]:
        """How its items grew."""
        for name, body in self._gain(delta):
            yield self._event(name, body)

    def closing(self) -> Iterator[str]:
        """The whole answer once more."""
        response = self._response()
        yield self._event(f"response.{response['status']}", {"response": response})

    def failed(self, error: ApiError) -> Iterator[str]:
        """What went wrong."""
        told = error.body()["error"]
        yield self._event("error", {"code": told["code"], "message": told["message"], "param": None, "error": told})

    def _event(self, name: str, body: dict[str, Any]) -> str:
        self._number += 1
        return event({"type": name, "sequence_number": self._number - 1} | body, name)

    def _response(self) -> dict[str, Any]:
        status = {None: "in_progress", "length": "incomplete"}.get(self._reason, "completed")
        response = self._head | {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": list(self._items),
            "usage": None,
        }
        if self._reason is not None:
            usage = self._usage
            response["usage"] = {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": self._reader.thought_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            }
            if (drafts := speculation(usage)) is not None:
                response["metrics"] = {"speculative_decoding": drafts}
        return response

    def _gain(self, delta: Delta) -> Iterator[Told]:
        for piece in self._reader.read(delta):
            if not self._continues(piece):
                yield from self._close()
                yield from self._open(piece)
            yield from self._grow(piece)
        self._usage, self._reason = delta.usage, delta.finish_reason
        if delta.finish_reason is not None:
            if not self._items:
                yield from self._open(Said(""))
            yield from self._close()

    def _continues(self, piece: Piece) -> bool:
        """Whether a piece is part of the latest item."""
        kind = {Said: "message", Thought: "reasoning", CallArguments: "function_call"}.get(type(piece))
        return bool(self._items) and self._items[-1]["type"] == kind

    def _open(self, piece: Piece) -> Iterator[Told]:
        name = uuid.uuid4().hex
        item: dict[str, Any]
        match piece:
            case CallBegin():
                item = {"id": f"fc_{name}", "type": "function_call", "call_id": new_call_id(), "name": piece.name}
                item["arguments"] = ""
            case Thought():
                item = {"id": f"rs_{name}", "type": "reasoning", "summary": [], "content": []}
            case _:
                item = {"id": f"msg_{name}", "type": "message", "role": "assistant", "content": []}
        item["status"] = "in_progress"
        self._items.append(item)
        yield "response.output_item.added", self._place() | {"item": dict(item)}
        if "content" in item:
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            if item["type"] == "message":
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item["content"] = [part]
            yield "response.content_part.added", self._part_place() | {"part": dict(part)}

    def _grow(self, piece: Piece) -> Iterator[Told]:
        item = self._items[-1]
        match piece:
            case CallArguments():
                item["arguments"] += piece.text
                yield "response.function_call_arguments.delta", self._item_place() | {"delta": piece.text}
            case Said() | Thought():
                part = item["content"][0]
                part["text"] += piece.text
                yield f"response.{part['type']}.delta", self._part_place() | {"delta": piece.text} | _logprobs(part)

    def _close(self) -> Iterator[Told]:
        """The latest item, if it is still growing, is whole, or cut where the answer is."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        item["status"] = "incomplete" if self._reason == "length" else "completed"
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield "response.function_call_arguments.done", self._item_place() | done
        else:
            part = item["content"][0]
            yield f"response.{part['type']}.done", self._part_place() | {"text": part["text"]} | _logprobs(part)
            yield "response.content_part.done", self._part_place() | {"part": dict(part)}
        yield "response.output_item.done", self._place() | {"item": dict(item)}

    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self._items) - 1}

    def _item_place(self) -> dict[str, Any]:
        return self._place() | {"item_id": self._items[-1]["id"]}

    def _part_place(self) -> dict[str, Any]:
        return self._item_place() | {"content_index": 0}


def _logprobs(part: dict[str, Any]) -> dict[str, Any]:
    """Of a text OpenAI's events have a list, which is empty where nobody asked for it."""
    return {"logprobs": []} if part["type"] == "output_text" else {}
