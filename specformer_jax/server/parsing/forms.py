"""Which form a model's answers have: told from its chat template."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

from specformer_jax.server.parsing import marked_calls, thoughts
from specformer_jax.server.parsing.json_calls import json_answer
from specformer_jax.server.parsing.reader import Reader, Source, Steps

Form = Callable[[Source, Collection[str]], Steps[None]]

# What a template writes around calls -> how a model that was trained with it answers; the first that is found.
_FORMS: dict[str, Form] = {
    "<|tool_call>": marked_calls.gemma_answer,
    "<start_function_call>": marked_calls.function_gemma_answer,
    "<tool_call>": marked_calls.hermes_answer,
    "[TOOL_CALLS]": marked_calls.mistral_answer,
}
# Of these a tokenizer may have special tokens, which are left out of a text where nobody asks for them.
MARKERS = (
    "<|tool_call>",
    "<tool_call|>",
    '<|"|>',
    "<start_function_call>",
    "<end_function_call>",
    "<escape>",
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[CALL_ID]",
    "[ARGS]",
    "<|python_tag|>",
    thoughts.OPEN,
    thoughts.CLOSE,
)


def tool_form(template: str) -> Form:
    """How models with this template write calls; as bare JSON, Llama 3's form, where it has no marks for them."""
    return next((form for mark, form in _FORMS.items() if mark in template), json_answer)


def thinks(template: str) -> bool:
    """Whether models with this template may think first."""
    return thoughts.CLOSE in template


def takes_tools(template: str) -> bool:
    """Whether the template has a place for tools."""
    return "tools" in template


def reader(template: str, tools: Collection[str], inside_thoughts: bool) -> Reader:
    """What reads one answer.

    Args:
      template: the source of the model's chat template.
      tools: the names of the tools that may be called; none reads no calls.
      inside_thoughts: whether the prompt ends within thoughts.
    """
    form = tool_form(template) if tools else marked_calls.plain_answer
    return Reader(functools.partial(_answer, form, tools, thinks(template), inside_thoughts))


def _answer(form: Form, tools: Collection[str], may_think: bool, inside_thoughts: bool, source: Source) -> Steps[None]:
    if may_think:
        yield from thoughts.thoughts(source, inside_thoughts)
    yield from form(source, tools)
