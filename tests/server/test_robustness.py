"""The server as a process under load, arbitrary requests and signals. Minutes; all traffic stays on loopback."""

import asyncio
import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.server.loopback import Served

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CLIENTS = 500
SECONDS = 60


@contextlib.contextmanager
def process(target, head, *flags):
    """(`Served` without app and engine, process) of a `serve.py http`."""
    flags = ["--target", str(target), "--draft", str(head), "--dtype", "float32", "--port", "0", *flags]
    command = [sys.executable, "-W", "error", "serve.py", "http", *flags]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        try:
            for line in running.stderr:
                if found := re.search(r"serving .* at http://127\.0\.0\.1:(\d+)", line):
                    yield Served(None, None, int(found[1])), running
                    return
            raise AssertionError(f"the server ended with {running.wait()}")
        finally:
            running.kill()


async def long_answers(served, target, count):
    """The body of a request for one, and so many open streams of them."""
    body = {"model": str(target), "prompt": "w5", "max_tokens": 180, "temperature": 1, "stream": True}
    streams = [Stream(served.port, body | {"seed": seed}) for seed in range(count)]
    for stream in streams:
        await stream.open()
    return body, streams


async def draining(served):
    """Until the server says that it is shutting down."""
    while (await asyncio.to_thread(served.request, "GET", "/health"))[0] == 200:
        await asyncio.sleep(0.01)


def test_sigterm_lets_answers_finish(tiny_target, tiny_head):
    async def scenario(served, running):
        body, streams = await long_answers(served, tiny_target, 40)
        await streams[0].event()
        running.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        await draining(served)
        status, _, answer = await asyncio.to_thread(served.request, "POST", "/v1/completions", body)
        assert status == 503 and json.loads(answer)["error"]["code"] == "shutting_down"
        for stream in streams:
            events = [event async for event in stream]
            assert events[-1] == "[DONE]", "answers that had begun, or waited, were finished"
            stream.close()
        code = await asyncio.to_thread(running.wait, 60)
        assert code == 0 and time.monotonic() - begin < 60

    with process(tiny_target, tiny_head, "--rows", "2", "--grace", "60") as (served, running):
        asyncio.run(scenario(served, running))


def test_a_second_signal_cancels_what_is_left_and_tells_its_clients(tiny_target, tiny_head):
    async def scenario(served, running):
        body, streams = await long_answers(served, tiny_target, 200)
        whole = asyncio.create_task(
            asyncio.to_thread(served.request, "POST", "/v1/completions", body | {"stream": False, "seed": 200})
        )
        await asyncio.sleep(0.2)
        running.send_signal(signal.SIGINT)
        await draining(served)
        running.send_signal(signal.SIGINT)
        last = [[event async for event in stream][-1] for stream in streams]
        given_up = [json.loads(event)["error"] for event in last if event != "[DONE]"]
        assert given_up and {error["code"] for error in given_up} == {"shutting_down"}
        status, _, answer = await whole
        assert status == 503 and json.loads(answer)["error"]["code"] == "shutting_down"
        for stream in streams:
            stream.close()
        assert await asyncio.to_thread(running.wait, 30) == 0
        assert "Traceback" not in running.stderr.read()

    with process(tiny_target, tiny_head, "--rows", "2", "--grace", "600") as (served, running):
        asyncio.run(scenario(served, running))


def test_no_request_breaks_the_server(served, tmp_path):
    """schemathesis: what fits the OpenAPI description, and what does not, finds no 5xx."""
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("needs the extra test-serve")
    description = json.loads(served.request("GET", "/openapi.json")[2])
    for kind in ("ChatRequest", "CompletionRequest", "ResponsesRequest", "MessagesRequest", "DialogueBody"):
        fields = description["components"]["schemas"][kind]["properties"]
        fields["model"] = {"const": served.engine.lm.name}  # valid requests reach the engine, and it is a small one
        if "n" in fields:
            fields["n"]["maximum"] = 2
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(description))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", served.url, "--seed", "1"]
    command += ["--checks", "not_a_server_error", "--max-examples", "10", "--generation-database", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert served.request("GET", "/health")[0] == 200 and idle(served)


def test_a_crowd_that_comes_and_goes(tiny_target, tiny_head):
    """500 clients for a minute, a third of which leave early: each gets its own answer, and nothing stays behind."""
    asks = [
        {"model": str(tiny_target), "prompt": f"w{5 + i} w{7 + i % 3}", "max_tokens": 4 + i, "stream": True, "seed": i}
        for i in range(24)
    ]

    async def client(served, number, wanted, until, counts):
        rng = random.Random(number)
        while time.monotonic() < until:
            i = rng.randrange(len(asks))
            stream = Stream(served.port, asks[i])
            status = await stream.open()
            if status == 429:
                counts["refused"] += 1
                assert 1 <= int(stream.headers["retry-after"]) <= 60
                stream.close()
                await asyncio.sleep(rng.uniform(0.2, 1.0))
                continue
            assert status == 200
            patience = rng.choice((rng.uniform(0, 0.3), None, None))
            try:
                text = ""
                async with asyncio.timeout(patience):
                    async for event in stream:
                        if event == "[DONE]":
                            assert text == wanted[i]
                            counts["answered"] += 1
                        else:
                            [choice] = json.loads(event)["choices"]
                            text += choice["text"]
                            assert wanted[i].startswith(text)
            except TimeoutError:
                counts["left"] += 1
            finally:
                stream.close()

    async def scenario(served, running):
        wanted = [await Stream(served.port, ask).text() for ask in asks]
        counts = dict.fromkeys(("answered", "left", "refused"), 0)
        until = time.monotonic() + SECONDS
        clients = [asyncio.create_task(client(served, n, wanted, until, counts)) for n in range(CLIENTS)]
        await asyncio.sleep(SECONDS / 3)
        before = resident(running.pid)
        await asyncio.gather(*clients)
        after = resident(running.pid)
        print(counts, f"server memory {before} -> {after} MB")
        assert counts["answered"] > CLIENTS / 2 and counts["left"] > CLIENTS / 4
        assert after < before * 1.1
        assert await asyncio.to_thread(idle, served), "every row and every page was given back"
        assert [await Stream(served.port, ask).text() for ask in asks] == wanted

    with process(tiny_target, tiny_head, "--slots", "4", "--max-queue", "400", "--grace", "5") as (served, running):
        asyncio.run(scenario(served, running))
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0


class Stream:
    """One streaming request over a bare socket; HTTP/1.0, so that the stream's end is the connection's."""

    def __init__(self, port, body):
        self._port, self._body = port, json.dumps(body)

    async def open(self):
        """Sends the request; the status."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = "POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(self._body)}\r\n\r\n{self._body}".encode())
        status = int((await self._reader.readline()).split()[1])
        lines = [line async for line in self._lines()]
        self.headers = dict(line.lower().split(": ", 1) for line in lines)
        return status

    async def _lines(self):
        while line := (await self._reader.readline()).decode().rstrip("\r\n"):
            yield line

    async def event(self):
        """The data of the next event; None at the end."""
        lines = [line async for line in self._lines()]
        return lines[0].removeprefix("data: ") if lines else None

    async def __aiter__(self):
        while (event := await self.event()) is not None:
            yield event

    async def text(self):
        """The whole answer."""
        assert await self.open() == 200
        *events, done = [event async for event in self]
        assert done == "[DONE]"
        self.close()
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    def close(self):
        self._writer.close()


def idle(served):
    """Whether nothing runs or waits or holds a page, at the latest after a while."""
    names = "num_requests_running|num_requests_waiting|kv_cache_usage_perc"
    for _ in range(100):
        text = served.request("GET", "/metrics")[2].decode()
        if not any(float(n) for n in re.findall(rf"^specformer:(?:{names}){{.*}} (\S+)", text, re.M)):
            return True
        time.sleep(0.1)
    return False


def resident(pid):
    """Megabytes of memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20
