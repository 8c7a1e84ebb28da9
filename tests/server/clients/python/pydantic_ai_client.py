"""pydantic-ai: text, output by tools, by the API and by the prompt, tools, streams; over chat and over responses."""

import contextlib
from typing import Literal

from checks import KEY, MODEL, QUESTION, URL, check, report
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import UsageLimitExceeded
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits

provider = OpenAIProvider(base_url=URL, api_key=KEY)
chat_model = OpenAIChatModel(MODEL, provider=provider)
SETTINGS = {"temperature": 0, "max_tokens": 96}


class Weather(BaseModel, extra="forbid"):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    degrees: int


@check("chat")
async def chat():
    agent = Agent(chat_model, instructions="Be brief.", model_settings=SETTINGS)
    assert (await agent.run(QUESTION)).output
    async with agent.run_stream(QUESTION) as run:
        assert "".join([text async for text in run.stream_text(delta=True)])


for model in (chat_model, OpenAIResponsesModel(MODEL, provider=provider)):
    for output in (ToolOutput, NativeOutput):

        @check(f"{output.__name__}: {'responses' if model is not chat_model else 'chat'}")
        async def structured(model=model, output=output):
            agent = Agent(model, output_type=output(Weather), model_settings=SETTINGS)
            assert (await agent.run(QUESTION)).output.city in ("Paris", "Rome")


@check("tools")
async def tools():
    called = []
    agent = Agent(chat_model, output_type=ToolOutput(Weather), model_settings=SETTINGS)

    @agent.tool_plain
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather of a city."""
        called.append(city)
        return "20 degrees"

    # With its output a tool as well, every answer calls one; which, is up to the model: a small one may go on for ever.
    with contextlib.suppress(UsageLimitExceeded):
        await agent.run(QUESTION, usage_limits=UsageLimits(request_limit=2))
    assert called and set(called) <= {"Paris", "Rome"}


report("pydantic-ai-slim")
