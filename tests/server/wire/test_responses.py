"""/v1/responses with OpenAI's own client: text, thoughts and calls, whole and as the events that they stream as."""

import json

import openai
import pytest

from specformer_jax.engine.request import Delta, Usage
from tests.server.wire.scripted import ScriptedHandle
from tests.server.wire.test_tools import TWO_CALLS

TOOLS = [
    {"type": "function", "name": "get_weather", "description": "of a city", "parameters": {"type": "object"}},
    {"type": "function", "name": "now", "parameters": None, "strict": True},
]
THOUGHTFUL = "<think>\nHm.\n</think>\n\n" + TWO_CALLS


@pytest.fixture
def ask(served):
    """Asks for a response that is this text."""
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:

        def ask(said, input="Is it raining?", **fields):
            served.engine.text = said
            return client.responses.create(model="scripted", input=input, **fields)

        yield ask


def asked(served):
    """The prompt that the engine got last."""
    return served.engine.lm.tokenizer.decode(served.engine.requests[-1].prompt_ids)


def test_a_text(served, ask):
    response = ask("Yes, it is.", instructions="Be brief.", temperature=0.5, max_output_tokens=50)
    assert response.output_text == "Yes, it is." and response.status == "completed" and response.error is None
    assert asked(served) == "system: Be brief.\nuser: Is it raining?\nassistant: "
    sampling = served.engine.requests[-1].sampling_params
    assert (sampling.temperature, sampling.max_new_tokens) == (0.5, 50)
    usage = response.usage
    assert usage.output_tokens == 12 and usage.total_tokens == usage.input_tokens + 12
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert response.output[0].role == "assistant" and response.id.startswith("resp_") and response.store is False


def test_a_response_that_is_cut(ask):
    response = ask("Yes, it is.", max_output_tokens=3)
    assert response.output_text == "Yes" and response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens" and response.output[0].status == "incomplete"
    assert list(ask("Yes, it is.", max_output_tokens=3, stream=True))[-1].type == "response.incomplete"


def test_an_empty_response_has_a_message(ask):
    assert ask("").output_text == "" and len(ask("").output) == 1


def test_a_response_may_begin_with_a_call(ask):
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    [item] = ask(call, tools=TOOLS).output
    assert (item.type, item.name, item.arguments) == ("function_call", "now", "{}")
    events = [event.type for event in ask(call, tools=TOOLS, stream=True)]
    assert events.count("response.output_item.added") == 1 and events[-1] == "response.completed"


def test_thoughts_and_calls_are_items(ask):
    response = ask(THOUGHTFUL, tools=TOOLS)
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    reasoning, message, first, second = response.output
    assert reasoning.content[0].text == "Hm." and message.content[0].text == "I'll look."
    assert (first.name, json.loads(first.arguments)) == ("get_weather", {"city": "Paris"})
    assert (second.name, second.arguments) == ("now", "{}") and first.call_id != second.call_id
    assert 10 <= response.usage.output_tokens_details.reasoning_tokens <= 25
    one = ask(THOUGHTFUL, tools=TOOLS, parallel_tool_calls=False)
    assert [item.type for item in one.output].count("function_call") == 1


@pytest.mark.parametrize("per_delta", [1, 5, 500])
def test_a_stream_tells_how_the_items_grow(served, ask, per_delta):
    served.engine.per_delta = per_delta
    events = list(ask(THOUGHTFUL, tools=TOOLS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    final = events[-1].response
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    open_items = {}
    for event in events[2:-1]:
        index = event.output_index
        if event.type == "response.output_item.added":
            assert index == len(open_items) and event.item.status == "in_progress"
            open_items[index] = ""
        elif event.type.endswith(".delta"):
            open_items[index] += event.delta
            assert event.item_id == final.output[index].id
        elif event.type == "response.function_call_arguments.done":
            assert event.arguments == open_items[index] == final.output[index].arguments
        elif event.type in ("response.output_text.done", "response.reasoning_text.done"):
            assert event.text == open_items[index] == final.output[index].content[0].text
        elif event.type == "response.output_item.done":
            assert event.item == final.output[index]
    assert kinds.count("response.output_item.done") == 4 == len(open_items)


def test_clients_gather_a_stream(served):
    """OpenAI's own accumulation agrees with the whole answer."""
    served.engine.text = THOUGHTFUL
    with (
        openai.OpenAI(base_url=served.url + "/v1", api_key="none") as client,
        client.responses.stream(model="scripted", input="x", tools=TOOLS) as stream,
    ):
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == "I'll look." and final.output[3].arguments == "{}"


def test_the_input_is_given_in_full(served, ask):
    """What a response held goes back as it came, with the tools' answers behind it."""
    response = ask(THOUGHTFUL, tools=TOOLS)
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Rain?"}]}]
    items += [item.model_dump(exclude_none=True) for item in response.output]
    items += [{"type": "function_call_output", "call_id": i.call_id, "output": "17 C"} for i in response.output[2:]]
    assert ask("It is 17 C.", items, tools=TOOLS).output_text == "It is 17 C."
    calls = '<tool_call>get_weather {"city": "Paris"}</tool_call><tool_call>now {}</tool_call>'
    assert asked(served).endswith(f"user: Rain?\nassistant: I'll look.{calls}\ntool: 17 C\ntool: 17 C\nassistant: ")
    two = [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    ask("d", two)
    assert asked(served) == "assistant: a\nassistant: b\nuser: c\nassistant: "


def test_reasoning_effort(served, ask):
    ask("x", reasoning={"effort": "none"})
    assert "<think>\n\n</think>" in asked(served)
    ask("x", reasoning={"effort": "high", "summary": "auto"})
    assert "<think>" not in asked(served)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"previous_response_id": "resp_1"}, "this server keeps none: send all of the input"),
        ({"background": True}, "this server keeps none"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tool_choice": "required"}, "'required' is none of the tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "'x' is none of the tools"),
        ({"truncation": "auto"}, "truncation would change the answer"),
        ({"extra_body": {"temprature": 1}}, "unknown field 'temprature'"),
        ({"input": "x" * 4000}, "This model's maximum context length is 4000 tokens"),
        ({"input": []}, "input"),
    ],
)
def test_what_is_not_served_is_refused(ask, fields, sentence):
    fields = dict(fields)
    with pytest.raises(openai.BadRequestError, match=sentence):
        ask("x", fields.pop("input", "y"), **fields)


def test_what_says_nothing_is_passed_over(ask):
    more = {"store": True, "metadata": {"a": "b"}, "user": "me", "include": [], "truncation": "disabled", "top_p": 1.0}
    assert ask("x", **more, text={"format": {"type": "text"}, "verbosity": "medium"}).output_text == "x"


def test_no_answer_is_kept(served):
    for method in ("GET", "DELETE"):
        status, _, body = served.request(method, "/v1/responses/resp_1")
        assert status == 404 and json.loads(body)["error"]["code"] == "not_stored"


def test_a_stream_that_breaks_says_so(served, monkeypatch):
    monkeypatch.setattr(served.engine, "submit", lambda _: ScriptedHandle([Delta((), Usage(1), "error", "a bug")]))
    with (
        openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="the engine failed"),
    ):
        list(client.responses.create(model="scripted", input="x", stream=True))
