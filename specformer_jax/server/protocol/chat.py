"""The body of /v1/chat/completions."""

from __future__ import annotations

from pydantic import Field, model_validator

from specformer_jax.server.errors import ApiError
from specformer_jax.server.protocol.dialogue import DialogueFields
from specformer_jax.server.protocol.generation import GenerationBody


class ChatRequest(DialogueFields, GenerationBody):
    """The body of /v1/chat/completions.

    Attributes:
      max_completion_tokens: the newer name of max_tokens.
      logprobs: report the log-probability of each token of the answer.
      top_logprobs: how many of the likeliest tokens to list beside it.
    """

    max_completion_tokens: int | None = Field(None, ge=0, lt=2**31)
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
    def raw(self) -> bool:
        """Whether the answer continues a text of the dialogue."""
        return self.continue_final_message

    @property
    def reported(self) -> int | None:
        """What the engine's requests take as `logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None
