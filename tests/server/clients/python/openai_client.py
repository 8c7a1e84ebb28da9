"""openai-python: chat, streams, parse, tools, responses, completions."""

import json
from typing import Literal

import openai
from checks import CITY, KEY, MODEL, QUESTION, URL, check, report
from pydantic import BaseModel

client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
ASKED = [{"role": "user", "content": QUESTION}]
TOOL = {"name": "get_weather", "description": "The weather of a city.", "parameters": CITY}
CHAT_TOOL = {"type": "function", "function": TOOL}
GREEDY = {"model": MODEL, "temperature": 0}


class Weather(BaseModel, extra="forbid"):
    city: Literal["Paris", "Rome"]
    degrees: int


@check("chat")
def chat():
    answer = client.chat.completions.create(messages=ASKED, max_tokens=16, **GREEDY)
    assert answer.choices[0].message.content and answer.usage.completion_tokens <= 16
    assert client.models.list().data[0].id == MODEL


@check("streams")
def streams():
    whole = client.chat.completions.create(messages=ASKED, max_tokens=16, **GREEDY)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(messages=ASKED, max_tokens=16, **options, **GREEDY))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content and chunks[-1].usage.completion_tokens == 16
    with client.chat.completions.stream(messages=ASKED, response_format=Weather, max_tokens=64, **GREEDY) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        message = stream.get_final_completion().choices[0].message
    assert text == message.content and message.parsed.city in ("Paris", "Rome")


@check("async")
async def asynchronous():
    async with openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0) as other:
        stream = await other.chat.completions.create(messages=ASKED, max_tokens=8, stream=True, **GREEDY)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


@check("parse")
def parse():
    answer = client.chat.completions.parse(messages=ASKED, response_format=Weather, max_tokens=64, **GREEDY)
    assert answer.choices[0].message.parsed.city in ("Paris", "Rome")


@check("tools")
def tools():
    answer = client.chat.completions.create(
        messages=ASKED, tools=[CHAT_TOOL], tool_choice="required", max_tokens=64, **GREEDY
    )
    message = answer.choices[0].message
    [call] = message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    told = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    again = client.chat.completions.create(
        messages=[*ASKED, message, told], tools=[CHAT_TOOL], tool_choice="none", max_tokens=16, **GREEDY
    )
    assert again.choices[0].message.content
    with client.chat.completions.stream(
        messages=ASKED, tools=[CHAT_TOOL], tool_choice="required", max_tokens=64, **GREEDY
    ) as stream:
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments


@check("parsed tools")
def parsed_tools():
    tool = openai.pydantic_function_tool(Weather)
    answer = client.chat.completions.parse(
        messages=ASKED, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=64, **GREEDY
    )
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)


@check("responses")
def responses():
    answer = client.responses.create(input=QUESTION, instructions="Be brief.", max_output_tokens=16, **GREEDY)
    assert answer.output_text
    parsed = client.responses.parse(input=QUESTION, text_format=Weather, max_output_tokens=64, **GREEDY)
    assert parsed.output_parsed.city in ("Paris", "Rome")
    [call] = client.responses.create(
        input=QUESTION, tools=[{"type": "function", **TOOL}], tool_choice="required", max_output_tokens=64, **GREEDY
    ).output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items = [{"role": "user", "content": QUESTION}, call.to_dict(), result]
    assert client.responses.create(input=items, max_output_tokens=16, **GREEDY).output_text


@check("streamed responses")
def streamed_responses():
    with client.responses.stream(input=QUESTION, text_format=Weather, max_output_tokens=64, **GREEDY) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text and final.output_parsed.city in ("Paris", "Rome")


@check("completions")
def completions():
    answer = client.completions.create(prompt=["Paris is", "Rome is"], max_tokens=4, logprobs=2, echo=True, **GREEDY)
    assert [choice.text.startswith(name) for choice, name in zip(answer.choices, ["Paris", "Rome"], strict=True)]


@check("errors")
def errors():
    try:
        client.chat.completions.create(messages=[{"role": "user", "content": "a " * 9000}], model=MODEL)
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded"
    else:
        raise AssertionError("a prompt beyond the context was answered")


report("openai")
