"""Tools as clients offer them, and how a model whose template knows none is told of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from specformer_jax.server.protocol.body import Body

_HOW_TO_CALL = """\
You may call tools. To call one, answer with nothing but a JSON object that names it and gives its arguments:
{"name": "the tool's name", "arguments": {"an argument's name": "its value"}}
Call a tool where you need it for your answer, and answer in words where you do not. These are the tools:"""


class FunctionDefinition(Body):
    """What a tool is called and takes.

    Attributes:
      name: what a call names.
      description: what the tool does.
      parameters: a JSON schema of its arguments.
      strict: asks for arguments that fit the schema; a call that is forced fits it in any case.
    """

    name: str = Field(pattern=r"^[\w.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class Tool(Body):
    """A tool that may be called."""

    type: Literal["function"]
    function: FunctionDefinition

    @classmethod
    def of(cls, name: str, description: str | None, parameters: dict[str, Any] | None, strict: bool = False) -> Tool:
        """The tool with this definition."""
        function = FunctionDefinition(name=name, description=description, parameters=parameters, strict=strict)
        return cls(type="function", function=function)

    @property
    def arguments(self) -> dict[str, Any]:
        """The schema of its arguments."""
        return self.function.parameters or {"type": "object"}

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class NamedFunction(Body):
    """The function that a choice names."""

    name: str


class NamedTool(Body):
    """The choice of one tool."""

    type: Literal["function"]
    function: NamedFunction

    @classmethod
    def of(cls, name: str) -> NamedTool:
        """The choice of the tool with this name."""
        return cls(type="function", function=NamedFunction(name=name))


class FunctionCall(Body):
    """Which function was called, with its arguments as JSON text."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Body):
    """A call that an answer held, as clients send it back."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: FunctionCall

    @classmethod
    def of(cls, id: str | None, name: str, arguments: str | dict[str, Any]) -> ToolCall:
        """The call of the tool with this name."""
        return cls(id=id, function=FunctionCall(name=name, arguments=arguments))

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: with its arguments as an object, where they are one."""
        arguments: Any = self.function.arguments
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):  # an answer that was cut may have called so
                arguments = json.loads(arguments)
        call = {"type": self.type, "function": {"name": self.function.name, "arguments": arguments}}
        return call if self.id is None else {"id": self.id} | call


def written_out(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A dialogue with tools for a template that knows none: all in the words of its users, assistants and system."""
    written: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        if calls := message.get("tool_calls"):
            lines = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
            content = "\n".join(([content] if content else []) + lines)
        if message["role"] != "tool":
            written.append({"role": message["role"], "content": content})
            continue
        answer = f"The tool {message.get('name', '')}".rstrip() + f" answered:\n{content}"
        if written and written[-1].get("is_tool"):
            written[-1]["content"] += "\n" + answer
        else:
            written.append({"role": "user", "content": answer, "is_tool": True})
    if tools:
        lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
        told = "\n".join([_HOW_TO_CALL, *lines])
        if written and written[0]["role"] == "system":
            told = f"{written.pop(0)['content']}\n\n{told}"
        written.insert(0, {"role": "system", "content": told})
    return [{"role": message["role"], "content": message["content"]} for message in written]
