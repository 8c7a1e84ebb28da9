"""The body of /v1/chat/completions."""

from __future__ import annotations

from pydantic import Field, model_validator

from specformer_jax.grammars import grammar
from specformer_jax.loading.tokenizer import Tokenizer
from specformer_jax.server.errors import ApiError
from specformer_jax.server.parsing.call_grammars import call_rules
from specformer_jax.server.protocol.dialogue import DialogueFields
from specformer_jax.server.protocol.generation import GenerationBody
from specformer_jax.server.protocol.tools import NamedTool


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

    def grammar(self, tokenizer: Tokenizer) -> str | None:
        """What the engine's requests take as `grammar`: calls where they are forced, else the format asked for.

        Raises:
          ApiError, UserError: it is no grammar, or a schema is none that this model's calls can follow.
        """
        schemas = {} if self.tool_choice == "none" else {tool.function.name: tool.arguments for tool in self.tools}
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        tools = {name: schema for name, schema in schemas.items() if named in (None, name)}
        forced = self.tool_choice not in ("auto", "none")
        if forced and not tools:
            message = f"tool_choice {named or 'required'!r} is none of the tools: offer it"
            raise ApiError(400, message, param="tool_choice", code="invalid_value")
        rule = self.response_format.rule
        if not tools or not (forced or rule):
            return super().grammar(tokenizer)
        calls = call_rules(tokenizer, tools, several=self.parallel_tool_calls and named is None)
        start = "start: calls" if forced else f"start: calls | answer\nanswer: {rule}"
        return grammar.of_parts(f"{start}\n{calls}")

    @property
    def reported(self) -> int | None:
        """What the engine's requests take as `logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None
