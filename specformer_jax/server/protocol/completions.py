"""The body of /v1/completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from specformer_jax.engine.request import Request
from specformer_jax.loading.tokenizer import Tokenizer
from specformer_jax.server.protocol.generation import GenerationBody, TokenId, Words

COMPLETION_TOKENS = 16  # OpenAI's default length of a completion


class CompletionRequest(GenerationBody):
    """The body of /v1/completions.

    Attributes:
      prompt: a text, a list of texts, token ids, or a list of such lists.
      add_special_tokens: whether a text gets what the model puts around every text, such as a begin token.
      logprobs: how many of the likeliest tokens to list beside each token of the answer.
      echo: the text begins with the prompt; with `logprobs` the prompt's tokens are scored, too, from the second on.
    """

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    add_special_tokens: bool = True
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    @property
    def raw(self) -> bool:
        """The answer continues the prompt's text."""
        return True

    def requests(
        self,
        prompt_ids: Sequence[int],
        most_tokens: int,
        logprobs: int | None,
        defaults: Mapping[str, float],
        bad_words: Words = (),
    ) -> list[Request]:
        """See `GenerationBody.requests`; with `echo` the prompt is scored, too."""
        found = super().requests(prompt_ids, most_tokens, logprobs, defaults, bad_words)
        scored = self.echo and logprobs is not None
        answers = not scored or self.max_tokens != 0
        return [dataclasses.replace(request, prompt_logprobs=scored, answers=answers) for request in found]

    def encode(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The token ids of each prompt."""
        prompt: Any = self.prompt  # the type of an item does not narrow the list's
        prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        return [
            tokenizer.encode(each, special=self.add_special_tokens) if isinstance(each, str) else each
            for each in prompts
        ]
