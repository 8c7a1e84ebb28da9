"""What goes wrong: every mistake and failure has its status, one sentence and OpenAI's shape; nobody else suffers."""

import json
import math
import socket
import threading

import openai
import pytest

from specformer_jax.engine.request import NOT_NUMBERS, Delta, Failed, QueueFull, Stopped, Usage
from specformer_jax.errors import UserError
from specformer_jax.server import errors
from tests.server.loopback import running

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "w5"}]


def error_of(answer):
    status, headers, body = answer
    assert headers["content-type"] == "application/json"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return status, error


MISTAKES = {
    "type": ({"temperature": "hot"}, "temperature: Input should be a valid number", "temperature"),
    "text for a number": ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer", "max_tokens"),
    "truth for a number": ({"max_tokens": True}, "max_tokens: Input should be a valid integer", "max_tokens"),
    "range": ({"temperature": 3}, "temperature: Input should be less than or equal to 2", "temperature"),
    "not finite": ({"temperature": math.nan}, "temperature", "temperature"),
    "large": ({"seed": 2**63}, "seed: Input should be less than", "seed"),
    "negative": ({"max_tokens": -1}, "max_tokens: Input should be greater than or equal to 0", "max_tokens"),
    "top-k": ({"top_k": -2}, "top_k: Input should be greater than or equal to -1", "top_k"),
    "speculative": ({"speculative": "fast"}, "speculative: Input should be 'auto' or 'off' or", "speculative"),
    "too many drafts": ({"speculative": 4}, "this draft head has 3 slots", None),
    "very many drafts": ({"speculative": 10**30}, "is out of range", None),
    "n": ({"n": 0}, "n: Input should be greater", "n"),
    "empty stop": ({"stop": ""}, "a stop string must not be empty", None),
    "stops": ({"stop": 5}, "stop: Input should be a valid string or Input should be a valid list", "stop"),
    "unknown field": ({"temprature": 1}, "unknown field 'temprature'", "temprature"),
    "unsupported": ({"length_penalty": 2}, "length_penalty would change the answer", "length_penalty"),
    "no token": ({"logit_bias": {"w5": 1}}, "logit_bias: Value error, its keys must be ids of tokens", "logit_bias"),
    "unknown token": ({"logit_bias": {"96": 1}}, "a token of logit_bias is not within the vocabulary of 96", None),
    "much bias": (
        {"logit_bias": {"5": 101}},
        "logit_bias.5: Input should be less than or equal to 100",
        "logit_bias.5",
    ),
    "penalty": ({"presence_penalty": -3}, "presence_penalty: Input should be greater", "presence_penalty"),
    "at least more than at most": ({"min_tokens": 5, "max_tokens": 4}, "min_tokens 5 must be within 0 and", None),
    "missing": ({"messages": None}, "messages is missing", "messages"),
    "no messages": ({"messages": []}, "messages: List should have at least 1 item", "messages"),
    "role": ({"messages": [{"role": "boss", "content": "w5"}]}, "messages.0.role: Input", "messages.0.role"),
    "content": ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input", "messages.0.content"),
    "message field": ({"messages": [{**MESSAGES[0], "x": 1}]}, "unknown field 'messages.0.x'", "messages.0.x"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0.type: Input should be 'text'",
        "messages.0.content.0.type",
    ),
    "top_logprobs": ({"top_logprobs": 2}, "top_logprobs needs logprobs: true", "top_logprobs"),
    "stream_options": ({"stream_options": {}}, "stream_options needs stream: true", "stream_options"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "the user's message has no content", "messages"),
    "oversize": ({"messages": [{"role": "user", "content": "w5 " * 190}]}, "the prompt has 192: shorten it", None),
    "surrogate": ({"\ud800": 1}, "", None),
    "surrogate in a message": ({"messages": [{"role": "user", "content": "w5 \ud800"}]}, "is no Unicode", None),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_answered_with_400(served, name):
    change, message, param = MISTAKES[name]
    status, error = error_of(
        served.request("POST", CHAT, {"model": served.engine.lm.name, "messages": MESSAGES} | change)
    )
    assert status == 400 and error["type"] == "invalid_request_error"
    assert message in error["message"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize("prompt", [None, 5, "", [], [[]], [-1], [96], [5, "w5"], [True], {"text": "w5"}, [2**40]])
def test_prompts_that_are_none_are_refused(served, prompt):
    body = {"model": served.engine.lm.name, "prompt": prompt}
    status, error = error_of(served.request("POST", "/v1/completions", body))
    assert status == 400, error


@pytest.mark.parametrize("body", ["", "{", "[]", "5", '"text"', b"\xff\xfe", "[" * 5000, "null"])
def test_bodies_that_are_no_object_are_refused(served, body):
    status, _ = error_of(served.request("POST", CHAT, body))
    assert status == 400


def test_paths_methods_and_sizes(served):
    assert error_of(served.request("GET", "/v1/nothing"))[0] == 404
    assert error_of(served.request("GET", CHAT))[0] == 405
    assert error_of(served.request("POST", "/v1/models"))[0] == 405
    status, error = error_of(served.request("POST", CHAT, b" " * (4 * 2**20 + 1)))
    assert status == 413 and "4194304" in error["message"]
    status, error = error_of(served.request("POST", CHAT, (b" " * 2**20 for _ in range(5))))  # in chunks
    assert status == 413 and "4194304" in error["message"]


def test_keys(engine):
    with running(engine, api_keys=["one", "zwei-ü"]) as served:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "one"},
            {"Authorization": "Basic one"},
            {"x-api-key": "wrong"},
        ):
            status, error = error_of(served.request("GET", "/v1/models", headers=headers))
            assert status == 401 and error["code"] == "invalid_api_key"
        for key in ("one", "zwei-ü".encode().decode("latin-1")):
            for header in ({"Authorization": f"Bearer {key}"}, {"x-api-key": key}):
                assert served.request("GET", "/v1/models", headers=header)[0] == 200
        # Without a key the body is not even read.
        assert served.request("POST", CHAT, "{")[0] == 401
        for path in ("/health", "/metrics", "/"):
            assert served.request("GET", path)[0] == 200
        with openai.OpenAI(base_url=served.url + "/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            assert client.with_options(api_key="one").models.list().data


class StandIn:
    """A handle whose deltas the test decides: the engine cannot be made to fail in these ways on command."""

    def __init__(self, *deltas):
        self.deltas = deltas
        self.cancelled = threading.Event()
        self.callback = None

    def subscribe(self, callback):
        self.callback = callback
        for delta in self.deltas:
            callback(delta)

    def cancel(self):
        if self.callback is not None and not self.deltas and not self.cancelled.is_set():
            self.callback(Delta((), Usage(1), "cancelled"))
        self.cancelled.set()


def submitting(monkeypatch, served, outcome):
    """Lets the engine's `submit` raise an exception or return a stand-in."""

    def submit(request):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(served.engine, "submit", submit)


@pytest.mark.parametrize(
    "outcome, status, kind",
    [
        (QueueFull(6.2), 429, openai.RateLimitError),
        (Stopped("over"), 503, openai.InternalServerError),
        (UserError("a sentence"), 400, openai.BadRequestError),
        (ValueError("a bug"), 500, openai.InternalServerError),
        (StandIn(Delta((), Usage(1), "error", "ValueError: a bug")), 500, openai.InternalServerError),
        (StandIn(Delta((), Usage(1), "error", NOT_NUMBERS)), 500, openai.InternalServerError),
        (StandIn(Delta((), Usage(1), "cancelled")), 503, openai.InternalServerError),
        (StandIn(Delta((), Usage(1), "deadline")), 503, openai.InternalServerError),
    ],
)
def test_what_the_engine_says(served, monkeypatch, outcome, status, kind):
    submitting(monkeypatch, served, outcome)
    body = {"model": served.engine.lm.name, "messages": MESSAGES}
    found, error = error_of(served.request("POST", CHAT, body))
    assert found == status and "a bug" not in error["message"], "what broke inside is for the log"
    if isinstance(outcome, StandIn) and outcome.deltas[0].error == NOT_NUMBERS:
        assert "NaN" in error["message"] and error["code"] == "not_numbers"
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**body)
        if status == 429:
            assert caught.value.response.headers["retry-after"] == "7"
        # Within a stream that has begun the error is an event.
        if isinstance(outcome, StandIn):
            with pytest.raises(openai.APIError):
                list(client.chat.completions.create(**body, stream=True))
    monkeypatch.undo()
    assert served.request("POST", CHAT, body | {"max_tokens": 2})[0] == 200


def test_a_step_that_fails_fails_its_requests_alone(served, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("a bug")

    body = {"model": served.engine.lm.name, "messages": MESSAGES, "max_tokens": 5, "seed": 0}
    whole = served.request("POST", CHAT, body)
    monkeypatch.setattr(served.engine.compiled_steps, "advance", broken)
    status, error = error_of(served.request("POST", CHAT, body))
    assert status == 500 and error["code"] == "engine_error"
    monkeypatch.undo()
    again = served.request("POST", CHAT, body)
    assert json.loads(again[2])["choices"] == json.loads(whole[2])["choices"]
    assert served.request("GET", "/health")[0] == 200


def test_all_choices_are_refused_together(served, monkeypatch):
    first = StandIn()
    outcomes = iter([first, QueueFull(1.0)])

    def submit(request):
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(served.engine, "submit", submit)
    body = {"model": served.engine.lm.name, "messages": MESSAGES, "n": 2}
    assert served.request("POST", CHAT, body)[0] == 429
    assert first.cancelled.is_set()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels_its_request(served, monkeypatch, stream):
    endless = StandIn()
    submitted = threading.Event()

    def submit(request):
        submitted.set()
        return endless

    monkeypatch.setattr(served.engine, "submit", submit)
    body = json.dumps({"model": served.engine.lm.name, "messages": MESSAGES, "stream": stream}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head.encode() + body)
        assert submitted.wait(20)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert not endless.cancelled.is_set()
    assert endless.cancelled.wait(20)


def test_an_engine_that_failed_is_not_one_that_shuts_down():
    assert errors.of(Failed("it could not go on")).body()["error"]["code"] == "engine_failed"
    assert errors.of(Stopped("it stops")).body()["error"]["code"] == "shutting_down"
