"""The grammars of answers that have to call a tool, in the form that the model's template teaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from specformer_jax.errors import UserError
from specformer_jax.grammars import grammar
from specformer_jax.loading.tokenizer import Tokenizer
from specformer_jax.server.parsing import forms, marked_calls
from specformer_jax.server.parsing.gemma_grammar import GemmaRules

Mark = Callable[[str], str]
# The marks around a call, and around a text within.
_GEMMA = {
    marked_calls.gemma_answer: ("<|tool_call>", "<tool_call|>", '<|"|>'),
    marked_calls.function_gemma_answer: ("<start_function_call>", "<end_function_call>", "<escape>"),
}
MOST_CALLS = 8  # of one answer: a small model would call for ever


def call_rules(tokenizer: Tokenizer, tools: Mapping[str, Any], several: bool) -> str:
    """Rules whose `calls` are one or more calls.

    Args:
      tokenizer: the vocabulary, with the template that tells the form.
      tools: the JSON schemas of the arguments, by the names of the tools.
      several: whether there may be more than one call.

    Raises:
      UserError: a schema has a keyword that the model's form cannot follow.
    """

    def mark(text: str) -> str:
        ids = tokenizer.token_ids([text]) & tokenizer.special_ids
        return grammar.token_rule(*ids) if ids else grammar.text_rule(text)

    form = forms.tool_form(tokenizer.chat_template or "")
    if form in _GEMMA:
        return _gemma_rules(mark, _GEMMA[form], tools, several)
    lines = []
    for i, (name, schema) in enumerate(tools.items()):
        properties = {"name": {"const": name}, "arguments": schema}
        call = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        lines.append(f"call{i}: {grammar.json_rule(call)}")
    lines.append("call: " + " | ".join(f"call{i}" for i in range(len(tools))))

    def separated(part: str, between: str) -> str:
        return f"{part} ({grammar.text_rule(between)} {part}){{0,{MOST_CALLS - 1}}}" if several else part

    match form:
        case forms.json_answer:
            lines.append("calls: call")
        case marked_calls.hermes_answer:
            lines.append(f'one: {mark("<tool_call>")} "\\n" call "\\n" {mark("</tool_call>")}')
            lines.append("calls: " + separated("one", "\n"))
        case marked_calls.mistral_answer:
            lines.append(f'calls: {mark("[TOOL_CALLS]")} "[" {separated("call", ", ")} "]"')
    return "\n".join(lines)


def _gemma_rules(mark: Mark, marks: tuple[str, str, str], tools: Mapping[str, Any], several: bool) -> str:
    """The same where a call is written begin call:name{...} end, with a mark around texts."""
    begin, end, quote = map(mark, marks)
    # Where the mark around texts is no token of its own, a text that holds its first letter might be cut there.
    letters = "." if quote.startswith("<") else f"[^{marks[2][0]}]"
    lines = []
    for i, (name, schema) in enumerate(tools.items()):
        schema = {"type": "object"} | schema
        arguments = GemmaRules(f"call{i}", schema, quote, letters)
        try:
            fields = arguments.rule(schema)
        except (AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"the parameters of {name} are no JSON schema that can be followed: {error}") from error
        lines += [*arguments.lines, f"call{i}: {begin} {grammar.text_rule(f'call:{name}')} {fields} {end}"]
    lines.append("call: " + " | ".join(f"call{i}" for i in range(len(tools))))
    lines.append(f"calls: call{{1,{MOST_CALLS if several else 1}}}")
    return "\n".join(lines)
