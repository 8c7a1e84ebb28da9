"""Tools and thoughts over /v1/chat/completions, with OpenAI's own client."""

import json

import openai
import pytest

from tests.server.loopback import running
from tests.server.wire.scripted import TEMPLATE, ScriptedEngine

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "the weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            "strict": True,
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
USER = {"role": "user", "content": "Is it raining?"}
TWO_CALLS = """I'll look.
<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
<tool_call>
{"name": "now", "arguments": {}}
</tool_call>"""
# Templates whose models write calls in other forms; the scripted engine's own is Hermes'.
MISTRAL = TEMPLATE.replace("<tool_call>", "[TOOL_CALLS]")
LLAMA = TEMPLATE.replace("<tool_call>", "call:").replace("</tool_call>", "")
WITHOUT_TOOLS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{{ 'assistant: ' }}"


@pytest.fixture(params=[TEMPLATE])
def served(request):
    with running(ScriptedEngine(request.param)) as served:
        yield served


@pytest.fixture
def ask(served):
    """Asks for a chat answer that is this text."""
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:

        def ask(text, messages=(USER,), **fields):
            served.engine.text = text
            return client.chat.completions.create(model="scripted", messages=list(messages), **fields)

        yield ask


def asked(served):
    """The prompt that the engine got last."""
    return served.engine.lm.tokenizer.decode(served.engine.requests[-1].prompt_ids)


def called(message):
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def gathered(chunks):
    """(content, thoughts, calls, finish reason) of a stream, put together as OpenAI's clients do."""
    content, thoughts, calls, reason = "", "", {}, None
    for chunk in chunks:
        [choice] = chunk.choices
        content += choice.delta.content or ""
        thoughts += (choice.delta.model_extra or {}).get("reasoning_content", "")
        for part in choice.delta.tool_calls or ():
            if part.id is not None:
                assert part.index not in calls and part.type == "function"
                calls[part.index] = [part.id, part.function.name, ""]
            calls[part.index][2] += part.function.arguments
        reason = choice.finish_reason or reason
    return content, thoughts, [calls[i] for i in range(len(calls))], reason


def test_an_answer_that_calls_tools(served, ask):
    choice = ask(TWO_CALLS, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I'll look."
    assert called(choice.message) == [("get_weather", {"city": "Paris"}), ("now", {})]
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == 2 and all(len(id) == 9 and id.isalnum() for id in ids)
    shown = asked(served)
    assert shown.startswith("tools:{") and '"the weather of a city"' in shown and '"strict"' not in shown


@pytest.mark.parametrize("per_delta", [1, 2, 7, 500])
def test_calls_stream_as_openai_sends_them(served, ask, per_delta):
    served.engine.per_delta = per_delta
    chunks = list(ask(TWO_CALLS, tools=TOOLS, stream=True))
    content, _, calls, reason = gathered(chunks)
    assert (content, reason) == ("I'll look.", "tool_calls")
    assert [(name, json.loads(arguments)) for _, name, arguments in calls] == [
        ("get_weather", {"city": "Paris"}),
        ("now", {}),
    ]
    if per_delta == 1:  # the arguments come as they are made
        assert sum(bool(c.choices[0].delta.tool_calls) for c in chunks) > 15
    assert all(
        c.choices[0].delta.content or c.choices[0].delta.tool_calls or c.choices[0].finish_reason for c in chunks[1:]
    ), "no chunk is empty"


def test_a_dialogue_with_calls_goes_back(served, ask):
    message = ask(TWO_CALLS, tools=TOOLS).choices[0].message
    silent = {"role": "assistant", "content": None, "tool_calls": [call.model_dump() for call in message.tool_calls]}
    answers = [{"role": "tool", "tool_call_id": call.id, "content": "17 C"} for call in message.tool_calls]
    for said in (message, silent):
        choice = ask("It is 17 C.", [USER, said, *answers], tools=TOOLS).choices[0]
        assert choice.message.content == "It is 17 C." and choice.finish_reason == "stop"
        assert '<tool_call>get_weather {"city": "Paris"}</tool_call>' in asked(served), "arguments are an object again"
        assert asked(served).endswith("tool: 17 C\ntool: 17 C\nassistant: ")


def test_one_call_at_most(ask):
    choice = ask(TWO_CALLS, tools=TOOLS, parallel_tool_calls=False).choices[0]
    assert called(choice.message) == [("get_weather", {"city": "Paris"})]
    calls = gathered(ask(TWO_CALLS, tools=TOOLS, parallel_tool_calls=False, stream=True))[2]
    assert [(name, arguments) for _, name, arguments in calls] == [("get_weather", '{"city": "Paris"}')]


def test_choices_of_tools(served, ask):
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    choice = ask(text, tools=TOOLS, tool_choice="none").choices[0]
    assert choice.message.content == text and not choice.message.tool_calls
    assert asked(served).startswith("user: "), "no tool is offered"
    assert ask(text).choices[0].message.content == text, "where there are no tools, a text is a text"
    for tools in ([], TOOLS):
        with pytest.raises(openai.BadRequestError, match="'x' is none of the tools") as caught:
            ask(text, tools=tools, tool_choice={"type": "function", "function": {"name": "x"}})
        assert caught.value.param == "tool_choice"


def test_an_answer_that_is_cut_within_a_call(ask):
    choice = ask(TWO_CALLS, tools=TOOLS, max_tokens=70).choices[0]
    assert choice.finish_reason == "length" and choice.message.tool_calls[0].function.name == "get_weather"


FORMS = [
    (MISTRAL, 'ok[TOOL_CALLS][{"name": "now", "arguments": {}}]', "ok"),
    (MISTRAL, "[TOOL_CALLS]now[ARGS]{}", None),
    (LLAMA, '<|python_tag|>{"name": "now", "parameters": {}}', None),
    (LLAMA, '{"name": "now", "parameters": {}}', None),
    (WITHOUT_TOOLS, '```json\n{"name": "now", "arguments": {}}\n```', None),
]


@pytest.mark.parametrize("served, text, content", FORMS, indirect=["served"])
def test_every_form_of_calls(served, ask, text, content):
    """Also where its marks are special tokens, which are otherwise no text."""
    choice = ask(text, tools=TOOLS).choices[0]
    assert (choice.message.content, called(choice.message)) == (content, [("now", {})])
    content, _, calls, reason = gathered(ask(text, tools=TOOLS, stream=True))
    assert (content or None, reason, calls[0][1:]) == (choice.message.content, "tool_calls", ["now", "{}"])


@pytest.mark.parametrize("served", [WITHOUT_TOOLS], indirect=True)
def test_a_template_without_tools_is_told_in_words(served, ask):
    message = ask('{"name": "now", "arguments": {}}', tools=TOOLS).choices[0].message
    assert asked(served).startswith("system: You may call tools.") and '"name": "get_weather"' in asked(served)
    system = {"role": "system", "content": "Be kind."}
    answers = [{"role": "tool", "tool_call_id": message.tool_calls[0].id, "name": "now", "content": "noon"}] * 2
    ask("Noon.", [system, USER, message, *answers], tools=TOOLS)
    prompt = asked(served)
    assert prompt.startswith("system: Be kind.\n\nYou may call tools.") and prompt.count("system: ") == 1
    assert 'assistant: {"name": "now", "arguments": {}}\nuser: The tool now answered:\nnoon\nThe tool now' in prompt
    ask("Hello.", [USER])
    assert asked(served) == "user: Is it raining?\nassistant: "


@pytest.mark.parametrize(
    "served, text",
    [
        (TEMPLATE, "<think>\nWell, {it} is.\n</think>\n\nYes."),
        (TEMPLATE + "{{ '<think>\\n' }}", "Well, {it} is.</think>\nYes."),
    ],
    indirect=["served"],
)
def test_thoughts_are_apart(served, ask, text):
    """Whether the answer opens them or the prompt did."""
    message = ask(text).choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes.", "Well, {it} is.")
    assert gathered(ask(text, stream=True))[:2] == ("Yes.", "Well, {it} is.")
    said = message.model_dump(exclude_none=True)
    ask("So.", [USER, said, USER])
    assert "assistant: Yes.\nuser" in asked(served)


def test_special_tokens_are_shown_on_request(served, ask):
    text = "a<|python_tag|>b"
    assert ask(text).choices[0].message.content == "a<|python_tag|>b", "a mark of a form that this template has"
    served.engine.text = "a[TOOL_CALLS]b"
    for shown, wanted in ((True, "ab"), (False, "a[TOOL_CALLS]b")):
        sent = {"model": "scripted", "prompt": "x", "skip_special_tokens": shown}
        answer = served.request("POST", "/v1/completions", sent)[2]
        assert json.loads(answer)["choices"][0]["text"] == wanted


@pytest.mark.parametrize(
    "tool", [{"type": "retrieval"}, {"type": "function"}, {"type": "function", "function": {"name": "a b"}}, "f"]
)
def test_tools_that_are_none_are_refused(ask, tool):
    with pytest.raises(openai.BadRequestError) as caught:
        ask("x", tools=[tool])
    assert caught.value.param.startswith("tools.0")
