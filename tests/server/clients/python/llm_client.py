"""llm, as its command reads a model from extra-openai-models.yaml."""

import json
import os
import subprocess
import sys
import tempfile

from checks import CITY, MODEL, QUESTION, URL, check, report

folder = tempfile.mkdtemp()
with open(os.path.join(folder, "extra-openai-models.yaml"), "w") as file:
    entry = {"model_id": "small", "model_name": MODEL, "api_base": URL, "supports_schema": True, "supports_tools": True}
    file.write(json.dumps([entry | {"completion": False}]))  # JSON is YAML


def ask(*arguments):
    environment = os.environ | {"LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
    command = [sys.executable, "-m", "llm", "prompt", "-m", "small", "-o", "temperature", "0", "-o", "max_tokens", "64"]
    run = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@check("chat")
def chat():
    assert ask(QUESTION) == ask(QUESTION, "--no-stream") != "\n"


@check("structured output")
def structured():
    assert json.loads(ask(QUESTION, "--schema", json.dumps(CITY)))["city"] in ("Paris", "Rome")


@check("tools")
def tools():
    code = 'def get_weather(city: str) -> str:\n    "The weather of a city"\n    return "sunny"\n'
    assert ask(QUESTION, "--functions", code)


report("llm")
