"""The body of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from specformer_jax.server.errors import ApiError
from specformer_jax.server.protocol.body import Body
from specformer_jax.server.protocol.generation import GenerationBody


class TextPart(Body):
    """A part of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a chat; an assistant's may have no content."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_empty(cls, data: Any) -> Any:
        """Clients send back the answers they were given, with lists of what these did not hold."""
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if k not in ("tool_calls", "annotations") or v != []}

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ApiError(400, f"the {self.role}'s message has no content", param="messages", code="missing_field")
        return self

    def for_template(self) -> dict[str, str]:
        """As chat templates read it; OpenAI's developer is what models know as system."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationBody):
    """The body of /v1/chat/completions.

    Attributes:
      max_completion_tokens: the newer name of max_tokens.
      logprobs: report the log-probability of each token of the answer.
      top_logprobs: how many of the likeliest tokens to list beside it.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    @property
    def reported(self) -> int | None:
        """What the engine's requests take as `logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None
