"""The grammars of answers that have to call a tool, in the form that the model's template teaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specformer_jax.grammars import grammar
from specformer_jax.loading.tokenizer import Tokenizer
from specformer_jax.server.parsing import forms, marked_calls

MOST_CALLS = 8  # of one answer: a small model would call for ever


def call_rules(tokenizer: Tokenizer, tools: Mapping[str, Any], several: bool) -> str | None:
    """Rules whose `calls` are one or more calls; None where the model's form has no grammar.

    Args:
      tokenizer: the vocabulary, with the template that tells the form.
      tools: the JSON schemas of the arguments, by the names of the tools.
      several: whether there may be more than one call.
    """

    def mark(text: str) -> str:
        ids = tokenizer.token_ids([text]) & tokenizer.special_ids
        return grammar.token_rule(*ids) if ids else grammar.text_rule(text)

    lines = []
    for i, (name, schema) in enumerate(tools.items()):
        properties = {"name": {"const": name}, "arguments": schema}
        call = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        lines.append(f"call{i}: {grammar.json_rule(call)}")
    lines.append("call: " + " | ".join(f"call{i}" for i in range(len(tools))))

    def separated(part: str, between: str) -> str:
        return f"{part} ({grammar.text_rule(between)} {part}){{0,{MOST_CALLS - 1}}}" if several else part

    match forms.tool_form(tokenizer.chat_template or ""):
        case forms.json_answer:
            lines.append("calls: call")
        case marked_calls.hermes_answer:
            lines.append(f'one: {mark("<tool_call>")} "\\n" call "\\n" {mark("</tool_call>")}')
            lines.append("calls: " + separated("one", "\n"))
        case marked_calls.mistral_answer:
            lines.append(f'calls: {mark("[TOOL_CALLS]")} "[" {separated("call", ", ")} "]"')
        case _:
            return None
    return "\n".join(lines)
