"""litellm, as a program and as its users' proxies call it."""

import json

import litellm
from checks import CITY, KEY, MODEL, QUESTION, URL, check, report

ASKED = [{"role": "user", "content": QUESTION}]
GREEDY = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY, "temperature": 0, "max_retries": 0}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": CITY}}


@check("chat")
def chat():
    answer = litellm.completion(messages=ASKED, max_tokens=16, **GREEDY)
    assert answer.choices[0].message.content
    assert litellm.completion(
        **GREEDY | {"model": f"hosted_vllm/{MODEL}"}, messages=ASKED, max_tokens=8, extra_body={"top_k": 1}
    )


@check("streams")
def streams():
    chunks = list(litellm.completion(messages=ASKED, max_tokens=16, stream=True, **GREEDY))
    assert litellm.stream_chunk_builder(chunks, messages=ASKED).choices[0].message.content


@check("structured output")
def structured():
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": CITY, "strict": True}}
    answer = litellm.completion(messages=ASKED, response_format=schema, max_tokens=64, **GREEDY)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")


@check("tools")
def tools():
    for stream in (False, True):
        answer = litellm.completion(
            messages=ASKED, tools=[TOOL], tool_choice="required", max_tokens=64, stream=stream, **GREEDY
        )
        answer = litellm.stream_chunk_builder(list(answer), messages=ASKED) if stream else answer
        [call] = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


@check("responses")
def responses():
    answer = litellm.responses(input=QUESTION, max_output_tokens=16, **GREEDY)
    assert answer.output[0].content[0].text


@check("completions")
def completions():
    answer = litellm.text_completion(
        **GREEDY | {"model": f"text-completion-openai/{MODEL}"}, prompt="Paris is", max_tokens=8
    )
    assert answer.choices[0].text


@check("errors")
def errors():
    try:
        litellm.completion(messages=[{"role": "user", "content": "a " * 9000}], **GREEDY)
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("a prompt beyond the context was answered")


report("litellm")
