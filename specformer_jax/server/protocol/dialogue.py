"""A dialogue as clients send it, and how the model's chat template writes it down."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from specformer_jax.grammars.matcher import Thoughts
from specformer_jax.loading.tokenizer import Tokenizer
from specformer_jax.server.errors import ApiError
from specformer_jax.server.parsing import forms, thoughts
from specformer_jax.server.parsing.reader import Reader
from specformer_jax.server.protocol.body import Body
from specformer_jax.server.protocol.tools import NamedTool, Tool, ToolCall, written_out

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class TextPart(Body):
    """A part of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a chat; an assistant's may have no content.

    Attributes:
      role: who says it.
      content: what is said.
      name: of who says it, where there are several; of the tool that answers.
      tool_calls: what an assistant's message calls.
      tool_call_id: the call that a tool's message answers.
      reasoning_content: what an assistant thought before; most templates leave it out of earlier turns.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_empty(cls, data: Any) -> Any:
        """Clients send back the answers they were given, with lists of what these did not hold."""
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if k != "annotations" or v != []}

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ApiError(400, f"the {self.role}'s message has no content", param="messages", code="missing_field")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it; OpenAI's developer is what models know as system."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.role == "tool":
            message |= {"tool_call_id": self.tool_call_id} if self.tool_call_id else {}
            message |= {"name": self.name} if self.name else {}
        return message | ({"reasoning_content": self.reasoning_content} if self.reasoning_content else {})


class ChatPrompt(NamedTuple):
    """A dialogue as the model reads it, and how its answer is to be read.

    Attributes:
      ids: the token ids.
      reader: makes what reads an answer.
      shown_ids: special tokens that its form needs to see as text.
      thoughts: what the model thinks before a grammar begins; None where it does not think.
    """

    ids: list[int]
    reader: Callable[[], Reader]
    shown_ids: frozenset[int]
    thoughts: Thoughts | None


class DialogueFields(Body):
    """The fields of a request that say what its dialogue is.

    Attributes:
      messages: what was said so far.
      add_generation_prompt: end with the header of the answer to come.
      continue_final_message: let the answer continue the last message; there is no header of another then.
      chat_template_kwargs: more for the template to read, `enable_thinking` say.
      reasoning_effort: "none" asks a thinking model not to think (`enable_thinking: false`), others to think; the
        template reads the word, too.
      tools: what the answer may call.
      tool_choice: "none" offers no tools, "required" and a named one force a call.
      parallel_tool_calls: false keeps only the first call of an answer.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: Effort | None = None
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _has_one_end(self) -> DialogueFields:
        if self.continue_final_message and self.add_generation_prompt:
            message = "the last message cannot be continued behind the header of another: leave out one of both"
            raise ApiError(400, message, param="continue_final_message", code="invalid_value")
        return self

    def as_prompt(self, tokenizer: Tokenizer) -> ChatPrompt:
        """The dialogue in the model's own chat template.

        Raises:
          ApiError: the model has no template.
          UserError: the template refuses the dialogue.
        """
        template = tokenizer.chat_template
        if template is None:
            raise ApiError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
        more = dict(self.chat_template_kwargs)
        if self.reasoning_effort is not None:
            effort = {"enable_thinking": self.reasoning_effort != "none", "reasoning_effort": self.reasoning_effort}
            more = effort | more
        messages = [message.for_template() for message in self.messages]
        tools = [] if self.tool_choice == "none" else [tool.for_template() for tool in self.tools]
        if forms.takes_tools(template):
            more["tools"] = tools or None
        else:
            messages = written_out(messages, tools)
        text = tokenizer.render(
            messages,
            more,
            add_generation_prompt=not self.continue_final_message and self.add_generation_prompt is not False,
            continue_final_message=self.continue_final_message,
        )
        names = [tool["function"]["name"] for tool in tools]
        reader = functools.partial(forms.reader, template, names, text.rstrip().endswith(thoughts.OPEN))
        shown = tokenizer.token_ids(forms.MARKERS) if names or forms.thinks(template) else frozenset()
        return ChatPrompt(tokenizer.encode(text, special=False), reader, shown, _thoughts(tokenizer, template, text))


def _thoughts(tokenizer: Tokenizer, template: str, prompt: str) -> Thoughts | None:
    """What the model thinks behind this prompt, where its marks are tokens."""
    if not forms.thinks(template) or prompt.rstrip().endswith(thoughts.CLOSE):
        return None
    ids = [id for mark in (thoughts.OPEN, thoughts.CLOSE) for id in tokenizer.token_ids([mark])]
    return Thoughts(ids[0], ids[1], prompt.rstrip().endswith(thoughts.OPEN)) if len(ids) == 2 else None
