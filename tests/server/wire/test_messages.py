"""Anthropic's /v1/messages: blocks of text, thoughts and calls, whole and as the events that they stream as."""

import json

import pytest

from tests.server.wire.test_tools import TWO_CALLS

TOOLS = [{"name": "get_weather", "description": "of a city", "input_schema": {"type": "object"}}]
USER = {"role": "user", "content": "Is it raining?"}
THOUGHTFUL = "<think>\nHm.\n</think>\n\n" + TWO_CALLS
CALL = {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}}


@pytest.fixture
def ask(served):
    """The JSON of an answer that is this text."""

    def ask(text, status=200, path="/v1/messages", **fields):
        served.engine.text = text
        sent = {"model": "scripted", "messages": [USER]} | ({"max_tokens": 500} if path == "/v1/messages" else {})
        found, _, body = served.request("POST", path, sent | fields)
        assert found == status, body
        return json.loads(body)

    return ask


def asked(served):
    """The prompt that the engine got last."""
    return served.engine.lm.tokenizer.decode(served.engine.requests[-1].prompt_ids)


def test_a_text(served, ask):
    answer = ask("Yes, it is.", system="Be brief.", stop_sequences=["!"], temperature=0.5, top_k=5)
    assert answer["content"] == [{"type": "text", "text": "Yes, it is."}] and answer["stop_reason"] == "end_turn"
    assert answer["usage"]["output_tokens"] == 12 and answer["type"] == "message" and answer["role"] == "assistant"
    assert asked(served) == "system: Be brief.\nuser: Is it raining?\nassistant: "
    request = served.engine.requests[-1]
    assert request.stop == ("!",) and (request.sampling_params.temperature, request.sampling_params.top_k) == (0.5, 5)
    assert ask("Yes, it is.", max_tokens=3)["stop_reason"] == "max_tokens"
    assert ask("", path="/v1/messages/count_tokens")["input_tokens"] == len("user: Is it raining?\nassistant: ")


def test_thoughts_and_calls_are_blocks(ask):
    answer = ask(THOUGHTFUL, tools=TOOLS)
    assert answer["stop_reason"] == "tool_use"
    thinking, text, call, other = answer["content"]
    assert thinking["thinking"] == "Hm." and text["text"] == "I'll look."
    assert call == CALL | {"id": call["id"]} and other["name"] == "now" and other["input"] == {}
    one = ask(THOUGHTFUL, tools=TOOLS, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block["type"] for block in one["content"]] == ["thinking", "text", "tool_use"]


@pytest.mark.parametrize("per_delta", [1, 5, 500])
def test_a_stream_tells_how_the_blocks_grow(served, per_delta):
    served.engine.text, served.engine.per_delta = THOUGHTFUL, per_delta
    sent = {"model": "scripted", "messages": [USER], "max_tokens": 500, "tools": TOOLS, "stream": True}
    stream = served.request("POST", "/v1/messages", sent)[2].decode()
    blocks, current, reason = [], None, None
    for entry in stream.strip().split("\n\n"):
        name, data = entry.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        match event["type"]:
            case "message_start":
                assert event["message"]["content"] == [] and event["message"]["usage"]["input_tokens"] > 0
            case "content_block_start":
                assert current is None and event["index"] == len(blocks)
                current = [event["content_block"], ""]
            case "content_block_delta":
                assert event["index"] == len(blocks)
                [part] = [value for key, value in event["delta"].items() if key != "type"]
                current[1] += part
            case "content_block_stop":
                blocks.append((current[0]["type"], current[1]))
                current = None
            case "message_delta":
                reason = event["delta"]["stop_reason"]
    assert current is None and reason == "tool_use" and event["type"] == "message_stop"
    assert blocks == [
        ("thinking", "Hm."),
        ("text", "I'll look."),
        ("tool_use", '{"city": "Paris"}'),
        ("tool_use", "{}"),
    ]


def test_a_dialogue_goes_back(served, ask):
    answer = ask(THOUGHTFUL, tools=TOOLS)
    calls = [block for block in answer["content"] if block["type"] == "tool_use"]
    results = [{"type": "tool_result", "tool_use_id": call["id"], "content": "17 C"} for call in calls]
    told = {"role": "user", "content": [*results, {"type": "text", "text": "Well?"}]}
    ask("So.", messages=[USER, {"role": "assistant", "content": answer["content"]}, told], tools=TOOLS)
    written = '<tool_call>get_weather {"city": "Paris"}</tool_call><tool_call>now {}</tool_call>'
    assert asked(served).endswith(f"I'll look.{written}\ntool: 17 C\ntool: 17 C\nuser: Well?\nassistant: ")
    ask(" is.", messages=[USER, {"role": "assistant", "content": "Yes, it"}])
    assert asked(served).endswith("assistant: Yes, it"), "an answer that was begun is continued"


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "'x' is none of the tools"),
        ({"tool_choice": {"type": "any"}}, "'required' is none of the tools"),
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "maximum context length is 4000 tokens"),
    ],
)
def test_what_is_not_served_is_refused(ask, fields, sentence):
    assert sentence in ask("x", 400, **fields)["error"]["message"]


def test_thinking_is_turned_off(served, ask):
    ask("x", thinking={"type": "disabled"})
    assert "<think>\n\n</think>" in asked(served)
    ask("x", thinking={"type": "enabled", "budget_tokens": 1024}, metadata={"user_id": "me"})
    assert "<think>" not in asked(served)
