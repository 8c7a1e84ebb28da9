"""llama-index: chat, streams, structured output, tools."""

from typing import Literal

from checks import KEY, MODEL, QUESTION, URL, check, report
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

COMMON = dict(
    model=MODEL, api_base=URL, api_key=KEY, temperature=0, max_tokens=64, max_retries=0, context_window=2048,
    is_chat_model=True,
)  # fmt: skip
llm = OpenAILike(is_function_calling_model=True, **COMMON)
ASKED = [ChatMessage(role="user", content=QUESTION)]


class Weather(BaseModel, extra="forbid"):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    degrees: int


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


@check("chat")
async def chat():
    assert llm.chat(ASKED).message.content
    assert llm.complete("Paris is").text
    assert "".join(part.delta or "" for part in llm.stream_chat(ASKED))
    assert (await llm.achat(ASKED)).message.content


@check("structured output")
def structured():
    answer = llm.as_structured_llm(Weather).chat(ASKED)
    assert answer.raw.city in ("Paris", "Rome")
    other = OpenAILike(should_use_structured_outputs=True, **COMMON)
    assert other.structured_predict(Weather, PromptTemplate(QUESTION)).city in ("Paris", "Rome")


@check("tools")
def tools():
    tool = FunctionTool.from_defaults(get_weather)
    answer = llm.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    [call] = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "get_weather" and call.tool_kwargs["city"] in ("Paris", "Rome")
    told = llm.predict_and_call([tool], user_msg=QUESTION, tool_required=True)
    assert str(told) in ("sunny in Paris", "sunny in Rome")


report("llama-index-llms-openai-like")
