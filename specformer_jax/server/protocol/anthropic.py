"""The body of Anthropic's /v1/messages: the same dialogue as a chat's, in other words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from specformer_jax.server.protocol.body import Body
from specformer_jax.server.protocol.chat import ChatRequest
from specformer_jax.server.protocol.dialogue import Message
from specformer_jax.server.protocol.generation import SamplingFields
from specformer_jax.server.protocol.tools import NamedTool, Tool, ToolCall


class Block(Body):
    """What its blocks have in common: a hint of what is worth keeping, which pages of the cache are anyway."""

    cache_control: dict[str, Any] | None = None


class TextBlock(Block):
    """Something said."""

    type: Literal["text"]
    text: str
    citations: list[Any] = Field(default_factory=list)


class ThinkingBlock(Block):
    """What an answer thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Block):
    """A call that an answer held."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Block):
    """What a tool answered."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool = False


class Turn(Body):
    """One message."""

    role: Literal["user", "assistant"]
    content: str | list[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock]


class OfferedTool(Block):
    """A tool that may be called."""

    type: Literal["custom"] = "custom"
    name: str = Field(pattern=r"^[\w.-]{1,128}$")
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(Body):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    def as_chosen(self) -> Literal["auto", "none", "required"] | NamedTool:
        """The same as a chat's request has it."""
        if self.type == "tool":
            return NamedTool.of(self.name or "")
        return "required" if self.type == "any" else self.type


class Thinking(Body):
    """Whether the model thinks first; how long is its own matter."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)


class DialogueBody(SamplingFields):
    """The fields that /v1/messages and /v1/messages/count_tokens share.

    Attributes:
      messages: what was said; a last one of the assistant is continued.
      system: what stands before it.
      stop_sequences: texts that end the answer.
    """

    messages: Annotated[list[Turn], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[OfferedTool] = Field(default_factory=list)
    tool_choice: ToolChoice = Field(default=ToolChoice(type="auto"))
    thinking: Thinking | None = None
    stop_sequences: Annotated[list[str], Field(max_length=16)] = Field(default_factory=list)

    def as_chat(self, max_tokens: int | None = None, stream: bool = False) -> ChatRequest:
        """The same as a request for a chat's answer."""
        choice = self.tool_choice
        given = {name: getattr(self, name) for name in SamplingFields.model_fields if name in self.model_fields_set}
        if self.stop_sequences:
            given["stop"] = self.stop_sequences
        messages = [] if self.system is None else [Message(role="system", content=_text(self.system))]
        for turn in self.messages:
            messages += _messages(turn)
        return ChatRequest(
            **given,
            messages=messages,
            max_tokens=max_tokens,
            stream=stream,
            tools=[Tool.of(tool.name, tool.description, tool.input_schema) for tool in self.tools],
            tool_choice=choice.as_chosen(),
            parallel_tool_calls=not choice.disable_parallel_tool_use,
            continue_final_message=messages[-1].role == "assistant",
            chat_template_kwargs={} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"},
        )


class MessagesRequest(DialogueBody):
    """The body of /v1/messages.

    Attributes:
      max_tokens: the most tokens of the answer.
    """

    max_tokens: int = Field(ge=1, lt=2**31)
    stream: bool = False


def _messages(turn: Turn) -> list[Message]:
    """What a chat has for a turn: its tools' answers first, as they are answers to the turn before."""
    blocks = [TextBlock(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
    said = [block for block in blocks if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [ToolCall.of(block.id, block.name, block.input) for block in blocks if isinstance(block, ToolUseBlock)]
    messages = [
        Message(role="tool", tool_call_id=block.tool_use_id, content=_text(block.content))
        for block in blocks
        if isinstance(block, ToolResultBlock)
    ]
    if said or calls or not messages:
        thought = "\n".join(thoughts) or None
        messages.append(Message(role=turn.role, content=_text(said), tool_calls=calls, reasoning_content=thought))
    return messages


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)
