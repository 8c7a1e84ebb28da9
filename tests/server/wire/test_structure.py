"""What clients ask an answer to look like: the grammar that the engine gets, and what it lets pass."""

import json

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from specformer_jax.server.parsing import forms
from tests.server.loopback import running
from tests.server.wire.scripted import TEMPLATE, ScriptedEngine
from tests.server.wire.test_tools import LLAMA, MISTRAL, TOOLS, USER

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "legs": {"enum": [2, 4]}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}
CAT, ODD = '{"name": "cat", "legs": 4}', '{"name": "cat", "legs": 3}'
WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
NOW = '{"name": "now", "arguments": {}}'
CALL = f"<tool_call>\n{WEATHER}\n</tool_call>"
OF_SCHEMA = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
BYTES = LLTokenizer("byte")


def follows(text: str, grammar: str) -> bool:
    """Whether a whole text follows a grammar, letter by letter."""
    matcher = LLMatcher(BYTES, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    taken = matcher.try_consume_tokens(list(text.encode()))
    return taken == len(text.encode()) and matcher.is_accepting()


def asked(served, path, status=200, **fields):
    """The engine's request for a body, or the error's message."""
    question = {CHAT: {"messages": [USER]}, COMPLETIONS: {"prompt": "x"}, RESPONSES: {"input": "x"}}[path]
    found, _, body = served.request("POST", path, {"model": "scripted"} | question | fields)
    assert found == status, body
    return served.engine.requests[-1] if status == 200 else json.loads(body)["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"response_format": OF_SCHEMA}, [CAT, CAT.replace(" ", "\n ")], [ODD, "cat", CAT + "x", CAT[:-1]]),
        ({"response_format": {"type": "json_object"}}, [CAT, ODD, "{}"], ["[]", "1", CAT[:-1]]),
        ({"structured_outputs": {"json": SCHEMA}}, [CAT], [ODD]),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, [CAT], [ODD]),
        ({"structured_outputs": {"json_object": True}}, ["{}"], ["1"]),
        ({"structured_outputs": {"regex": "[ab]{2}c?"}}, ["ab", "bbc"], ["a", "abcc"]),
        ({"structured_outputs": {"choice": ["yes", "no (really)"]}}, ["yes", "no (really)"], ["no", "maybe"]),
        ({"guided_json": SCHEMA}, [CAT], [ODD]),
        ({"guided_regex": "[ab]{2}c?"}, ["ab"], ["a"]),
        ({"guided_choice": ["yes", "no"], "guided_json": None}, ["yes", "no"], ["maybe"]),
        ({"guided_grammar": 'root ::= "a" | "b" root'}, ["bba"], ["ab"]),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b" root'}}, ["a", "bba"], ["b", "ab"]),
        ({"structured_outputs": {"grammar": 'start: "a" | "b" start'}}, ["a", "bba"], ["b", "ab"]),
    ],
)
def test_formats(served, path, fields, right, wrong):
    grammar = asked(served, path, **fields).grammar
    assert all(follows(text, grammar) for text in right)
    assert not any(follows(text, grammar) for text in wrong)


def test_what_asks_for_nothing(served):
    for path in (CHAT, COMPLETIONS):
        for fields in ({}, {"response_format": {"type": "text"}}, {"response_format": None, "structured_outputs": {}}):
            assert asked(served, path, **fields).grammar is None
    assert asked(served, RESPONSES, text={"format": {"type": "text"}}).grammar is None
    assert asked(served, RESPONSES, response_format={"type": "text"}, structured_outputs={}).grammar is None
    message = asked(served, RESPONSES, 400, response_format={"type": "json_object"})
    assert message.startswith("response_format would change the answer")


def test_a_format_of_responses(served):
    flat = {"type": "json_schema", "name": "animal", "schema": SCHEMA, "strict": True}
    grammar = asked(served, RESPONSES, text={"format": flat}).grammar
    assert follows(CAT, grammar) and not follows(ODD, grammar)
    _, _, body = served.request("POST", RESPONSES, {"model": "scripted", "input": "x", "text": {"format": flat}})
    assert json.loads(body)["text"]["format"] == flat, "what was asked for comes back in its own words"
    assert follows("{}", asked(served, RESPONSES, text={"format": {"type": "json_object"}}).grammar)


def test_two_formats_at_once_and_what_is_none(served):
    for fields, sentence in (
        ({"response_format": OF_SCHEMA, "structured_outputs": {"regex": "a"}}, "leave out one of both"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "must have one of"),
        ({"guided_regex": "a", "structured_outputs": {"json": {}}}, "must have one of"),
        ({"structured_outputs": {"choice": []}}, "one text at least"),
        ({"structured_outputs": {"grammar": "nonsense ("}}, "the grammar cannot be read"),
        ({"structured_outputs": {"json": "{"}}, "not valid JSON"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": OF_SCHEMA, "min_tokens": 3}, "do not go with a grammar"),
    ):
        assert sentence in asked(served, CHAT, 400, **fields)


@pytest.mark.parametrize("template", [TEMPLATE, MISTRAL, LLAMA])
def test_calls_that_are_forced(template):
    with running(ScriptedEngine(template)) as served:
        [mark] = served.engine.lm.tokenizer.token_ids(
            ["[TOOL_CALLS]"]
        )  # a token that the bytes have another letter for
        written = {
            TEMPLATE: lambda *calls: "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls),
            MISTRAL: lambda *calls: f"{chr(mark)}[{', '.join(calls)}]",
            LLAMA: lambda *calls: "\n".join(calls),
        }[template]
        several = template != LLAMA
        grammar = asked(served, CHAT, tools=TOOLS, tool_choice="required").grammar
        assert follows(written(WEATHER), grammar) and follows(written(NOW), grammar)
        assert follows(written(WEATHER, NOW), grammar) == several
        for wrong in (
            "It rains.",
            "",
            written('{"name": "then", "arguments": {}}'),
            written(WEATHER.replace("city", "x")),
        ):
            assert not follows(wrong, grammar)
        alone = asked(served, CHAT, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).grammar
        assert follows(written(NOW), alone) and not follows(written(NOW, NOW), alone)
        named = asked(served, CHAT, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "now"}}).grammar
        assert follows(written(NOW), named) and not follows(written(WEATHER), named)
        assert asked(served, CHAT, tools=TOOLS, tool_choice="auto").grammar is None
        both = asked(served, CHAT, tools=TOOLS, response_format=OF_SCHEMA).grammar
        assert follows(written(NOW), both) and follows(CAT, both) and not follows(ODD, both)


NODE = {"type": "object", "properties": {"v": {"type": "boolean"}, "on": {"$ref": "#/$defs/node"}}, "required": ["v"]}
ANY = {"type": "object"}
FIELDS = {
    "city": {"type": "string", "maxLength": 5},
    "days": {"type": "integer", "minimum": 1, "maximum": 5},
    "kinds": {"type": "array", "items": {"enum": ["a", 1]}, "minItems": 1, "maxItems": 2},
    "node": {"$ref": "#/$defs/node"},
    "other": {"anyOf": [{"type": "null"}, {"const": {"b": ["x"]}}, {"type": ["number", "boolean"]}, ANY]},
}
GEMMA_TOOL = {"type": "object", "properties": FIELDS, "required": ["city"], "$defs": {"node": NODE}}


@pytest.mark.parametrize(
    ("begin", "end", "quote"),
    [("<|tool_call>", "<tool_call|>", '<|"|>'), ("<start_function_call>", "<end_function_call>", "<escape>")],
)
def test_calls_in_gemmas_forms(begin, end, quote):
    tool = {"type": "function", "function": {"name": "f", "parameters": GEMMA_TOOL}}
    with running(ScriptedEngine(TEMPLATE.replace("<tool_call>", begin))) as served:

        def grammar(**fields):
            return asked(served, CHAT, tools=[tool, *TOOLS], tool_choice="required", **fields).grammar

        def call(inner, name="f"):
            return f"{begin}call:{name}{{{inner.replace('|', quote)}}}{end}"

        several, alone = grammar(), grammar(parallel_tool_calls=False)
        for right in (
            "city:|Paris|",
            "city:||,days:3",
            "city:|a|,kinds:[|a|,1],node:{on:{v:true},v:false},other:null",
            "city:|a|,other:{b:[|x|]}",
            "city:|a|,other:{c:|x|,d:1.5}",
            "city:|a|,other:-1e3",
        ):
            assert follows(call(right), alone) and follows(call(right) + call("", "now"), several), right
            assert not follows(call(right) * 2, alone)
            reader = forms.reader(served.engine.lm.tokenizer.chat_template, ["f"], False)
            arguments = json.loads("".join(p.text for p in reader.push(call(right), True) if hasattr(p, "text")))
            jsonschema.validate(arguments, GEMMA_TOOL)
        for wrong in (
            "days:3",
            "city:|Berlin|",
            "city:|a|,days:6",
            "city:|a|,kinds:[]",
            "days:3,city:|a|",
            "city:|a|,node:{on:{},v:true}",
            "city:|a|,other:{b:[|y|]",
        ):
            assert not follows(call(wrong), several), wrong
        tool["function"]["parameters"] = {"type": "object", "not": {}}
        message = asked(served, CHAT, 400, tools=[tool], tool_choice="required")
        assert message.startswith("not of a schema cannot be followed")
        for odd in ({"properties": [1]}, {"properties": {"a": {"type": "string", "minLength": "2"}}}, {"required": 5}):
            tool["function"]["parameters"] = odd
            assert "no JSON schema" in asked(served, CHAT, 400, tools=[tool], tool_choice="required")


def test_thoughts_come_before_the_grammar():
    engine = ScriptedEngine(marks=("<think>", "</think>"))
    begin, end = (next(iter(engine.lm.tokenizer.token_ids([mark]))) for mark in ("<think>", "</think>"))
    with running(engine) as served:
        fields = {"response_format": OF_SCHEMA}
        assert asked(served, CHAT, **fields).thoughts == (begin, end, False)
        assert asked(served, CHAT, reasoning_effort="none", **fields).thoughts is None
        assert asked(served, COMPLETIONS, **fields).thoughts is None
