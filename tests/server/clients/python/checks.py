"""What these scripts share: each is run with the server's address, and prints what worked and what did not."""

import asyncio
import importlib.metadata
import inspect
import json
import sys
import traceback

SERVER, MODEL = sys.argv[1], "smollm2-135m"
URL, KEY = SERVER + "/v1", "none"

CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}}
CITY |= {"required": ["city"], "additionalProperties": False}
QUESTION = "How is the weather in Paris?"
_found: dict[str, str] = {}


def check(name):
    """Runs a function now, and notes under its name whether it raised."""

    def run(function):
        try:
            outcome = function()
            if inspect.iscoroutine(outcome):
                asyncio.run(outcome)
            _found[name] = "ok"
        except BaseException as error:
            traceback.print_exc()
            _found[name] = f"{type(error).__name__}: {error}"[:500]
        return function

    return run


def report(package):
    """Prints all that was checked as the last line of the output."""
    print(json.dumps({"version": importlib.metadata.version(package), "checks": _found}))
