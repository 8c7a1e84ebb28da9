"""Real clients against a real server: what their users do first, by the packages themselves.

    CLIENTS_JSON=benchmarks/results/clients.json pytest -n 0 -m clients && python -m benchmarks.numbers

writes the table of docs/serving.md. A script a client stands in `python/` and `node/`; each prints what worked.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import client_table
from benchmarks.numbers import RESULTS

HERE = Path(__file__).parent
SCRIPTS = sorted([*(HERE / "python").glob("*_client.py"), *(HERE / "node").glob("*.mjs")])
SCRIPTS = [script for script in SCRIPTS if script.stem != "checks"]
NAMES = {
    "openai_client": "openai-python",
    "llm_client": "llm",
    "openai": "openai-node",
    "ai": "ai, @ai-sdk/openai, @ai-sdk/openai-compatible",
}


def name(script: Path) -> str:
    """What a script's client is called."""
    return NAMES.get(script.stem, script.stem.removesuffix("_client").replace("_", "-"))


@pytest.mark.clients
@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_a_client(script, environments, server, findings):
    interpreter, folder = environments.interpreter(script.suffix), script.parent
    if script.suffix == ".mjs":
        folder = environments.node  # where its packages are
    elif script.stem == "openai_client":
        interpreter = sys.executable  # the newest, which the others do not allow yet
    command = [interpreter, str(folder / script.name), server]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0 and run.stdout.strip(), run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert set(found["checks"].values()) == {"ok"}, f"{found}\n{run.stderr}"
    findings[name(script)] = {"client": name(script), "version": found["version"], "checks": list(found["checks"])}


def test_the_table_has_every_client():
    found = json.loads((RESULTS / "clients.json").read_text())
    assert [client["client"] for client in found["clients"]] == sorted(map(name, SCRIPTS))
    rows = client_table.markdown(found).splitlines()[2:]
    assert len(rows) == len(SCRIPTS) and all(row.count("|") == 4 for row in rows)
