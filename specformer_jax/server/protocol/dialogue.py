"""A dialogue as clients send it, and how the model's chat template writes it down."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from specformer_jax.loading.tokenizer import Tokenizer
from specformer_jax.server.errors import ApiError
from specformer_jax.server.protocol.body import Body


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


class DialogueFields(Body):
    """The fields of a request that say what its dialogue is.

    Attributes:
      messages: what was said so far.
      add_generation_prompt: end with the header of the answer to come.
      continue_final_message: let the answer continue the last message; there is no header of another then.
      chat_template_kwargs: more for the template to read, `enable_thinking` say.
      reasoning_effort: "none" asks a thinking model not to think (`enable_thinking: false`), others to think; the
        template reads the word, too.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field({})
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

    @model_validator(mode="after")
    def _has_one_end(self) -> DialogueFields:
        if self.continue_final_message and self.add_generation_prompt:
            message = "the last message cannot be continued behind the header of another: leave out one of both"
            raise ApiError(400, message, param="continue_final_message", code="invalid_value")
        return self

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """The ids of the dialogue in the model's own chat template.

        Raises:
          ApiError: the model has no template.
          UserError: the template refuses the dialogue.
        """
        if not tokenizer.has_chat_template:
            raise ApiError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
        more = dict(self.chat_template_kwargs)
        if self.reasoning_effort is not None:
            effort = {"enable_thinking": self.reasoning_effort != "none", "reasoning_effort": self.reasoning_effort}
            more = effort | more
        return tokenizer.chat(
            [message.for_template() for message in self.messages],
            more,
            add_generation_prompt=not self.continue_final_message and self.add_generation_prompt is not False,
            continue_final_message=self.continue_final_message,
        )
