"""The body of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from specformer_jax.server.protocol.generation import GenerationBody, TokenId

COMPLETION_TOKENS = 16  # OpenAI's default length of a completion


class CompletionRequest(GenerationBody):
    """The body of /v1/completions.

    Attributes:
      prompt: a text, a list of texts, token ids, or a list of such lists.
      logprobs: how many of the likeliest tokens to list beside each token of the answer.
    """

    raw: ClassVar[bool] = True

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    logprobs: int | None = Field(None, ge=0, le=20)

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt, text or token ids."""
        prompt: Any = self.prompt  # the type of an item does not narrow the list's
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
