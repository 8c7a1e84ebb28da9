"""smolagents: a model's text, and an agent that calls tools."""

from checks import KEY, MODEL, QUESTION, URL, check, report
from smolagents import OpenAIServerModel, ToolCallingAgent, tool

model = OpenAIServerModel(MODEL, api_base=URL, api_key=KEY, temperature=0, max_tokens=96)
called = []


@tool
def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: the city's name
    """
    called.append(city)
    return "sunny"


@check("chat")
def chat():
    asked = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    assert model.generate(asked).content
    assert "".join(part.content or "" for part in model.generate_stream(asked))


@check("tools")
def tools():
    asked = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    message = model.generate(asked, tools_to_call_from=[get_weather])
    assert message.tool_calls[0].function.name == "get_weather"


@check("agent")
def agent():
    runner = ToolCallingAgent(tools=[get_weather], model=model, max_steps=2, verbosity_level=0)
    runner.prompt_templates["system_prompt"] = "Answer with a tool."  # its own is longer than this model's context
    assert runner.run(QUESTION) is not None and runner.memory.steps


report("smolagents")
