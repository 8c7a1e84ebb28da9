"""openai-agents: tools, their answers, structured output and streams, over chat and over responses."""

from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)  # fmt: skip
from checks import KEY, MODEL, QUESTION, URL, check, report
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)
called = []


class Weather(BaseModel, extra="forbid"):
    city: Literal["Paris", "Rome"]
    degrees: int


@function_tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    called.append(city)
    return "It is sunny."


for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):

    def agent(kind=kind, **more):
        model = kind(model=MODEL, openai_client=AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0))
        # A text that is cut is an error to this client, and so is a small model that calls and calls.
        ends = {} if more else {"stop": ["."]}
        chosen = "required" if "tools" in more else None
        settings = ModelSettings(temperature=0, max_tokens=64, tool_choice=chosen, extra_body=ends)
        return Agent(name="Weather", instructions="Be brief.", model=model, model_settings=settings, **more)

    @check(f"text: {kind.__name__}")
    async def text(agent=agent):
        run = Runner.run_streamed(agent(), QUESTION)
        kinds = {event.type async for event in run.stream_events()}
        assert run.final_output and "raw_response_event" in kinds

    @check(f"tools: {kind.__name__}")
    async def tools(agent=agent):
        called.clear()
        run = await Runner.run(agent(tools=[get_weather], tool_use_behavior="stop_on_first_tool"), QUESTION)
        assert called and run.final_output == "It is sunny."

    @check(f"structured output: {kind.__name__}")
    async def structured(agent=agent):
        run = await Runner.run(agent(output_type=Weather), QUESTION)
        assert run.final_output.city in ("Paris", "Rome")


report("openai-agents")
