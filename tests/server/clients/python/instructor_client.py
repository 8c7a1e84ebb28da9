"""instructor: every mode that speaks to OpenAI's API."""

from collections.abc import Iterable
from typing import Literal

import instructor
from checks import KEY, MODEL, URL, check, report
from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=URL, api_key=KEY, max_retries=0)
MODES = ("TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON", "PARALLEL_TOOLS", "RESPONSES_TOOLS")
# Two modes only hope for the right form; the server's own fields see to it, as the model is a small one.
FORMS = {
    "MD_JSON": {"structured_outputs": {"regex": r'```json\n\{"city": "(Paris|Rome)", "degrees": \d\d?\}\n```'}},
    "PARALLEL_TOOLS": {"tool_choice": "required"},
}


class Weather(BaseModel, extra="forbid"):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    degrees: int


for mode in MODES:

    @check(mode)
    def ask(mode=mode):
        asked = instructor.from_openai(client, mode=instructor.Mode[mode])
        kind = Iterable[Weather] if mode == "PARALLEL_TOOLS" else Weather
        messages = [{"role": "user", "content": 'It is 20 degrees in Paris. Example: {"city": "Rome", "degrees": 7}'}]
        sampling = {"temperature": 0, "max_tokens": 96, "extra_body": FORMS.get(mode, {})}
        found = asked.create(model=MODEL, response_model=kind, messages=messages, max_retries=0, **sampling)
        if mode == "PARALLEL_TOOLS":
            found = next(iter(found))
        assert found.city in ("Paris", "Rome")


@check("partial")
def partial():
    asked = instructor.from_openai(client)
    messages = [{"role": "user", "content": "It is 20 degrees in Paris."}]
    parts = list(
        asked.create_partial(model=MODEL, response_model=Weather, messages=messages, temperature=0, max_tokens=96)
    )
    assert parts[-1].city in ("Paris", "Rome")


report("instructor")
