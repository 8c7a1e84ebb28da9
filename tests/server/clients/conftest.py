"""What the clients need: an environment for each side, made once and kept in pytest's cache, and a server."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
collect_ignore = ["python"]  # these run in an environment of their own


class Environments:
    """The interpreters of each side, by the suffix of a script; what is not there yet is being installed.

    Attributes:
      node: the folder of the scripts for node, with their packages.
    """

    def __init__(self, folder: Path):
        self._python, self.node = folder / "python", folder / "node"
        with ThreadPoolExecutor() as pool:
            self._made = {".py": pool.submit(self._make_python), ".mjs": pool.submit(self._make_node)}

    def interpreter(self, suffix: str) -> str:
        """What runs scripts of this side; skips the test where its packages cannot be installed."""
        try:
            return self._made[suffix].result()
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            pytest.skip(f"the clients could not be installed: {said.strip().splitlines()[-1]}")

    def _make_python(self) -> str:
        python = str(self._python / "bin" / "python")
        if not Path(python).exists():
            _run(sys.executable, "-m", "venv", str(self._python))
        wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted["test-clients"])
        return python

    def _make_node(self) -> str:
        shutil.copytree(HERE / "node", self.node, dirs_exist_ok=True)
        _run("npm", "install", "--no-audit", "--no-fund", "--omit=optional", "--loglevel=error", cwd=self.node)
        return str(self.node / "node_modules" / ".bin" / "node")


def _run(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)


@pytest.fixture(scope="session")
def environments(request):
    return Environments(Path(request.config.cache.mkdir("clients")))


@pytest.fixture(scope="session")
def server(tmp_path_factory, environments):
    """The address of `serve.py http` with the built-in model, greedily the same for all."""
    command = [sys.executable, "serve.py", "http", "--port", "0", "--rows", "4", "--max-context", "2048"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file, subprocess.Popen(command, cwd=ROOT, stderr=file) as process:
        try:
            yield _address(log, process)
        finally:
            process.terminate()


def _address(log: Path, process: subprocess.Popen) -> str:
    """What the server says it serves at."""
    for _ in range(600):
        if found := re.search(r"serving .* at (\S+)", log.read_text()):
            return found[1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
            break
    raise RuntimeError(f"the server did not start: {log.read_text()}")


@pytest.fixture(scope="session")
def findings():
    """What each client is found to do; written where CLIENTS_JSON says, for the table in docs/serving.md."""
    found: dict[str, dict] = {}
    yield found
    if path := os.environ.get("CLIENTS_JSON"):
        Path(path).write_text(json.dumps({"clients": [found[name] for name in sorted(found)]}, indent=1) + "\n")
