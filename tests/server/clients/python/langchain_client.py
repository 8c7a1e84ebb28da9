"""langchain-openai: structured output by every method, tools, streams."""

from typing import Literal

from checks import KEY, MODEL, QUESTION, URL, check, report
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

model = ChatOpenAI(base_url=URL, api_key=KEY, model=MODEL, temperature=0, max_tokens=48, max_retries=0)


class Weather(BaseModel, extra="forbid"):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    degrees: int


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


@check("chat")
async def chat():
    assert model.bind(max_tokens=8).invoke(QUESTION).content
    short = model.bind(max_tokens=8)
    assert "".join(chunk.content for chunk in short.stream(QUESTION))
    assert (await short.ainvoke(QUESTION)).usage_metadata["output_tokens"] == 8
    assert OpenAI(base_url=URL, api_key=KEY, model=MODEL, temperature=0, max_tokens=8).invoke("Paris is")


for method in ("json_schema", "function_calling"):

    @check(f"structured output: {method}")
    def structured(method=method):
        chain = model.with_structured_output(Weather, method=method)
        assert chain.invoke(QUESTION).city in ("Paris", "Rome")
        strict = model.with_structured_output(Weather, method=method, strict=True)
        assert list(strict.stream(QUESTION))[-1].city in ("Paris", "Rome")


@check("structured output: json_mode")
def json_mode():
    """Leaves the fields to the prompt."""
    chain = model.with_structured_output(None, method="json_mode")
    assert isinstance(chain.invoke('Repeat this JSON: {"city": "Paris"}'), dict)


for choice in ("any", "get_weather"):

    @check(f"tools: {choice}")
    def tools(choice=choice):
        bound = model.bind_tools([get_weather], tool_choice=choice, parallel_tool_calls=False, strict=True)
        said = bound.invoke(QUESTION)
        call = said.tool_calls[0]
        told = get_weather.invoke(call)
        assert isinstance(told, ToolMessage) and told.content in ("sunny in Paris", "sunny in Rome")
        assert model.bind_tools([get_weather], tool_choice="none").invoke([HumanMessage(QUESTION), said, told]).content
        gathered = None
        for chunk in bound.stream(QUESTION):
            gathered = chunk if gathered is None else gathered + chunk
        assert gathered.tool_calls[0]["args"] == call["args"]


@check("responses")
def responses():
    other = ChatOpenAI(base_url=URL, api_key=KEY, model=MODEL, temperature=0, max_tokens=48, use_responses_api=True)
    assert other.invoke(QUESTION).text
    assert "".join(chunk.text for chunk in other.stream(QUESTION))
    assert other.with_structured_output(Weather).invoke(QUESTION).city in ("Paris", "Rome")
    assert other.bind_tools([get_weather], tool_choice="any", strict=True).invoke(QUESTION).tool_calls


report("langchain-openai")
