"""The bodies of /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from specformer_jax.server.errors import ApiError
from specformer_jax.server.protocol.body import Body
from specformer_jax.server.protocol.dialogue import DialogueFields, Message
from specformer_jax.server.protocol.generation import TokenId


class TokenizeRequest(DialogueFields):
    """The body of /tokenize: a text, or a dialogue as /v1/chat/completions takes it.

    Attributes:
      model: the model's name; it may be left out.
      prompt: a text.
      messages: a dialogue, in place of a text.
      add_special_tokens: whether a text gets what the model puts around every text; a template sees to it itself.
      return_token_strs: list the tokens' texts, too.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] = Field(default_factory=list)
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _is_one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise ApiError(400, "give either a prompt or messages", param="prompt", code="missing_field")
        return self


class DetokenizeRequest(Body):
    """The body of /detokenize.

    Attributes:
      model: the model's name; it may be left out.
      tokens: token ids.
    """

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**20)]
