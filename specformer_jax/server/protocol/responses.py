"""The body of /v1/responses: the same dialogue as a chat's, in other words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from specformer_jax.server.errors import ApiError
from specformer_jax.server.protocol.body import Body
from specformer_jax.server.protocol.chat import ChatRequest
from specformer_jax.server.protocol.dialogue import Effort, Message, TextPart
from specformer_jax.server.protocol.generation import SamplingFields
from specformer_jax.server.protocol.structure import FlatFormat, TextFormat, as_response_format
from specformer_jax.server.protocol.tools import FunctionDefinition, NamedFunction, NamedTool, Tool, ToolCall

_STATE = ("previous_response_id", "conversation", "background", "prompt")  # what only a server that keeps answers has


class ItemPart(Body):
    """A part of an item's content; only text is understood.

    Attributes:
      annotations, logprobs: what an answer held beside its text, and clients send back.
    """

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] = Field(default_factory=list)


class Item(Body):
    """What its items have in common: where they were part of an answer, their name and how it went."""

    id: str | None = None
    status: str | None = None


class MessageItem(Item):
    """Something said."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ItemPart]
    phase: str | None = None


class CallItem(Item):
    """A call that an answer held."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutputItem(Item):
    """What a tool answered."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ItemPart]


class ReasoningItem(Item):
    """What an answer held of thoughts."""

    type: Literal["reasoning"]
    summary: list[ItemPart] = Field(default_factory=list)
    content: list[ItemPart] = Field(default_factory=list)


class FunctionTool(FunctionDefinition):
    """A tool that may be called."""

    type: Literal["function"]


class NamedFunctionTool(NamedFunction):
    """The choice of one tool."""

    type: Literal["function"]


class Reasoning(Body):
    """How much to think; what is thought is shown in full."""

    effort: Effort | None = None
    summary: str | None = None


class TextOptions(Body):
    """How the text of an answer is to look."""

    format: FlatFormat = Field(default=TextFormat(type="text"))
    verbosity: Literal["medium"] = "medium"


class ResponsesRequest(SamplingFields):
    """The body of /v1/responses; it keeps no state, so the input holds all that was said.

    Attributes:
      input: a text, or messages, calls, their answers and thoughts.
      instructions: what stands before the input, as a system message.
      max_output_tokens: the most tokens of the answer, its thoughts included.
    """

    input: str | Annotated[list[MessageItem | CallItem | CallOutputItem | ReasoningItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    stream: bool = False
    tools: list[FunctionTool] = Field(default_factory=list)
    tool_choice: Literal["auto", "none", "required"] | NamedFunctionTool = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning = Field(default=Reasoning())
    text: TextOptions = Field(default=TextOptions())
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _needs_no_state(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for field in _STATE:
            if data.get(field):
                message = f"{field} needs answers that are kept, and this server keeps none: send all of the input"
                raise ApiError(400, message, param=field, code="unsupported_field")
        return {k: v for k, v in data.items() if k not in _STATE}

    def as_chat(self) -> ChatRequest:
        """The same as a request for a chat's answer."""
        choice = self.tool_choice
        given = {name: getattr(self, name) for name in SamplingFields.model_fields if name in self.model_fields_set}
        return ChatRequest(
            **given,
            messages=self._messages(),
            max_tokens=self.max_output_tokens,
            stream=self.stream,
            tools=[Tool.of(tool.name, tool.description, tool.parameters, tool.strict) for tool in self.tools],
            tool_choice=choice if isinstance(choice, str) else NamedTool.of(choice.name),
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort=self.reasoning.effort,
            chat_template_kwargs=self.chat_template_kwargs,
            response_format=as_response_format(self.text.format),
        )

    def _messages(self) -> list[Message]:
        """The dialogue; what an answer thought, said and called is one message of a chat's."""
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        names: dict[str, str] = {}
        for item in items:
            match item:
                case MessageItem(role="assistant"):
                    message = _assistant(messages, joins=not _has_spoken(messages))
                    message.content = _text(item.content)
                case MessageItem():
                    messages.append(Message(role=item.role, content=_parts(item.content)))
                case ReasoningItem():
                    thought = _text(item.content)
                    _assistant(messages, joins=False).reasoning_content = thought or None
                case CallItem():
                    names[item.call_id] = item.name
                    call = ToolCall.of(item.call_id, item.name, item.arguments)
                    _assistant(messages, joins=True).tool_calls.append(call)
                case CallOutputItem():
                    answer, name = _text(item.output), names.get(item.call_id)
                    messages.append(Message(role="tool", tool_call_id=item.call_id, content=answer, name=name))
        return messages


def _assistant(messages: list[Message], joins: bool) -> Message:
    """The assistant's message that an item is part of: the last, where it may join it, or a new one."""
    if not (joins and messages and messages[-1].role == "assistant"):
        messages.append(Message(role="assistant", tool_calls=[]))
    return messages[-1]


def _has_spoken(messages: list[Message]) -> bool:
    """Whether the last message has all that an assistant's can have but calls."""
    return bool(messages) and (messages[-1].content is not None or bool(messages[-1].tool_calls))


def _text(content: str | list[ItemPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _parts(content: str | list[ItemPart]) -> str | list[TextPart]:
    return content if isinstance(content, str) else [TextPart(type="text", text=part.text) for part in content]
