"""What is read of answers: the same however their text was cut, and nothing of it lost."""

from __future__ import annotations

import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specformer_jax.server.parsing import forms, thoughts
from specformer_jax.server.parsing.json_calls import json_answer
from specformer_jax.server.parsing.marked_calls import (
    function_gemma_answer,
    gemma_answer,
    hermes_answer,
    mistral_answer,
    plain_answer,
)
from specformer_jax.server.parsing.reader import CallArguments, CallBegin, Reader, Said, Thought

NAMES = ("f", "get_weather")
CALL = '{"name": "f", "arguments": {"a": "x}\\"{", "b": [1, {"c": null}]}}'
ARGUMENTS = '{"a": "x}\\"{", "b": [1, {"c": null}]}'

# form, text, what is said, what is called
ANSWERS = [
    (plain_answer, "<tool_call> <think> as it is ", "<tool_call> <think> as it is ", []),
    (hermes_answer, "no call < here  \n", "no call < here  \n", []),
    (hermes_answer, f"<tool_call>\n{CALL}\n</tool_call>", "", [("f", ARGUMENTS)]),
    (
        hermes_answer,
        f'Let me see.\n<tool_call>{CALL}</tool_call>\n<tool_call>\n{{"name": "g", "arguments": {{}}}}\n</tool_call>\n',
        "Let me see.",
        [("f", ARGUMENTS), ("g", "{}")],
    ),
    (hermes_answer, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call> so', "so", [("f", '{"a": 1}')]),
    (hermes_answer, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (hermes_answer, '<tool_call>{"name": "f", "arguments": {"a": "é', "", [("f", '{"a": "é')]),
    (hermes_answer, "<tool_call>\n\nno json</tool_call> end", "<tool_call>\n\nno json</tool_call> end", []),
    (hermes_answer, '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    (json_answer, '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (
        json_answer,
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "get_weather", "parameters": {"b": "é"}}',
        "",
        [("f", "{}"), ("get_weather", '{"b": "é"}')],
    ),
    (
        json_answer,
        '```json\n[{"name": "f", "arguments": {}}, {"type": "function", "function": {"name": "f"}}]\n```\n',
        "",
        [("f", "{}"), ("f", "{}")],
    ),
    (json_answer, '{"name": "f", "arguments": {}} it is', "it is", [("f", "{}")]),
    (json_answer, '{"name": "Bob", "arguments": {"a": 1}}', '{"name": "Bob", "arguments": {"a": 1}}', []),
    (json_answer, '{"answer": {"name": "f"}}', '{"answer": {"name": "f"}}', []),
    (json_answer, '  Hello {"name"', '  Hello {"name"', []),
    (json_answer, "```python\nprint(1)\n```", "```python\nprint(1)\n```", []),
    (json_answer, "[1, 2, 3]", "[1, 2, 3]", []),
    (json_answer, "<b>bold</b>", "<b>bold</b>", []),
    (json_answer, "", "", []),
    (
        mistral_answer,
        f'[TOOL_CALLS] [{CALL}, {{"name": "f", "arguments": {{}}}}]',
        "",
        [("f", ARGUMENTS), ("f", "{}")],
    ),
    (
        mistral_answer,
        'ok [TOOL_CALLS]get_weather{"city": "x"}[TOOL_CALLS]f[CALL_ID]abc123[ARGS]{"a": {}}',
        "ok",
        [("get_weather", '{"city": "x"}'), ("f", '{"a": {}}')],
    ),
    (mistral_answer, "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
    (mistral_answer, "[TOOL_CALLS] [ no", "[TOOL_CALLS] [ no", []),
    (
        gemma_answer,
        'Sure.<|tool_call>call:f{a:<|"|>x, } y<|"|>,n:5,l:[1,<|"|>b<|"|>],o:{t:true}}<tool_call|>',
        "Sure.",
        [("f", '{"a": "x, } y", "n": 5, "l": [1, "b"], "o": {"t": true}}')],
    ),
    (
        function_gemma_answer,
        "<start_function_call>call:g{c:<escape>Paris<escape>}<end_function_call>"
        "<start_function_call>call:f{}<end_function_call>",
        "",
        [("g", '{"c": "Paris"}'), ("f", "{}")],
    ),
    (gemma_answer, "<|tool_call>what<tool_call|>", "<|tool_call>what<tool_call|>", []),
    (gemma_answer, "<|tool_call>call:f{a:[1,2", "", [("f", '{"a": [1, 2]}')]),
]


def read(form, parts):
    """What is said, thought and called in parts of a text."""
    reader = Reader(form)
    pieces = [piece for part in parts for piece in reader.push(part)] + reader.push("", ended=True)
    assert reader.push("", ended=True) == []
    calls: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, CallBegin):
            calls.append([piece.name, ""])
        elif isinstance(piece, CallArguments):
            calls[-1][1] += piece.text
    said, thought = ("".join(p.text for p in pieces if isinstance(p, kind)) for kind in (Said, Thought))
    return said, thought, [tuple(call) for call in calls]


@pytest.mark.parametrize("form, text, said, calls", ANSWERS, ids=lambda value: getattr(value, "__name__", ""))
def test_an_answer_is_read_the_same_wherever_it_is_cut(form, text, said, calls):
    form = functools.partial(form, names=NAMES)
    assert read(form, [text]) == (said, "", calls)
    assert read(form, text) == (said, "", calls)
    for at in range(1, len(text)):
        assert read(form, [text[:at], text[at:]]) == (said, "", calls), text[:at]


THINKING = [
    (False, "<think>\nhm, {x}\n</think>\n\nyes", "yes", "hm, {x}"),
    (False, "\n\n<think></think>x", "x", ""),
    (False, "  <th", "  <th", ""),
    (False, "plain", "plain", ""),
    (True, "hm\n\nmore</think>yes", "yes", "hm\n\nmore"),
    (True, "never ends", "", "never ends"),
]


@pytest.mark.parametrize("inside, text, said, thought", THINKING)
def test_thoughts(inside, text, said, thought):
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    for end, calls in (("", []), (call, [("f", "{}")] if said and thought else None)):
        if calls is None:
            continue
        form = functools.partial(forms._answer, hermes_answer, NAMES, True, inside)
        for at in range(len(text + end) + 1):
            assert read(form, [(text + end)[:at], (text + end)[at:]]) == (said, thought, calls)


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.sampled_from([*forms.MARKERS, CALL, "[", "]", "{", "}", '"', ",", " ", "\n", "x", "call:f"])),
    form=st.sampled_from([hermes_answer, json_answer, mistral_answer, gemma_answer, function_gemma_answer]),
    inside=st.booleans(),
)
def test_nothing_stops_the_reading(parts, form, inside):
    """Marks in any order: no error, no endless loop, the same at any cut; arguments of a marked call are its own."""
    form = functools.partial(forms._answer, form, NAMES, True, inside)
    whole = read(form, ["".join(parts)])
    assert read(form, parts) == whole == read(form, "".join(parts))


@pytest.mark.parametrize(
    "template, form",
    [
        ("{% if tools %}<tool_call>", hermes_answer),
        ("{% if tools %}[TOOL_CALLS]", mistral_answer),
        ("{% if tools %}<|tool_call>", gemma_answer),
        ("{% if tools %}<start_function_call>", function_gemma_answer),
        ("{% if tools %}<|python_tag|>", json_answer),
        ("{{ messages }}", json_answer),
    ],
)
def test_the_template_tells_the_form(template, form):
    assert forms.tool_form(template) is form
    assert forms.takes_tools(template) is ("tools" in template)
    assert not forms.thinks(template) and forms.thinks(template + thoughts.CLOSE)


def test_long_answers_are_read_in_linear_time():
    """A megabyte, a few letters at a time: as much work a letter as for a short one."""
    arguments = json.dumps({"a": "x" * 500_000})
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>' + "word " * 100_000
    parts = [text[i : i + 50] for i in range(0, len(text), 50)]
    assert read(functools.partial(hermes_answer, names=NAMES), parts) == ("word " * 100_000, "", [("f", arguments)])
