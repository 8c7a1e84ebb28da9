"""What real clients send beside the question: honoured, passed over where it asks for nothing, refused by name."""

import json
import logging

import pytest

from specformer_jax.server.protocol import body
from tests.server.loopback import running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "w5 w6"}]


def ask(served, path, **fields):
    """(status, JSON) of a request for a greedy answer."""
    question = {"prompt": "w5 w6"} if path == COMPLETIONS else {"messages": MESSAGES}
    sent = {"model": served.engine.lm.name, "temperature": 0, "max_tokens": 8} | question | fields
    status, _, answer = served.request("POST", path, sent)
    return status, json.loads(answer)


def chunks(served, path, **fields):
    """The JSON chunks of a stream."""
    question = {"prompt": "w5 w6"} if path == COMPLETIONS else {"messages": MESSAGES}
    sent = {"model": served.engine.lm.name, "temperature": 0, "max_tokens": 8, "stream": True} | question | fields
    status, _, stream = served.request("POST", path, sent)
    lines = [line.removeprefix("data: ") for line in stream.decode().splitlines() if line]
    assert status == 200 and lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# What vLLM's bench client, guidellm, litellm, LangChain and llama.cpp's clients send when nothing special is asked for.
NOTHING = {
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "length_penalty": 1.0,
    "ignore_eos": False,
    "min_tokens": 0,
    "top_k": -1,
    "top_p": 1,
    "min_p": 0.0,
    "typical_p": 1.0,
    "mirostat": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "chat_template_kwargs": {},
    "logit_bias": {},
    "stop_token_ids": [],
    "bad_words": [],
    "guided_decoding_backend": "auto",
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "echo": False,
    "best_of": 1,
    "stop": None,
    "user": "me",
    "cache_prompt": True,
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_asks_for_nothing_changes_nothing(served, path):
    status, answer = ask(served, path, **NOTHING)
    assert status == 200, answer
    plain = ask(served, path)[1]
    assert answer["choices"] == plain["choices"]


@pytest.mark.parametrize("field", sorted(body._NEUTRAL))
def test_a_neutral_value_is_known_for_each_field_that_is_not_served(field):
    for value in body._NEUTRAL[field]:
        assert body.without_unserved({field: value}, ()) == {}
    with pytest.raises(body.ApiError, match=f"^{field} would change the answer"):
        body.without_unserved({field: "something else"}, ())


def test_a_field_without_meaning_is_logged_once(caplog):
    body._say_ignored.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert body.without_unserved({"user": "me", "top_k": 5}, {"top_k"}) == {"top_k": 5}
    assert [record.getMessage() for record in caplog.records] == [
        "clients send user, which says nothing about an answer: it is ignored"
    ]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("fields", [{"length_penalty": 2}, {"suffix": "x"}])
def test_what_would_change_the_answer_is_refused_by_name(served, path, fields):
    status, answer = ask(served, path, **fields)
    [field] = fields
    assert status == 400 and answer["error"]["param"] == field and answer["error"]["code"] == "unsupported_field"
    assert answer["error"]["message"].startswith(f"{field} would change the answer")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("speculative", ["off", 3])
def test_bias_and_penalties_change_the_answer(served, path, speculative):
    tokenizer = served.engine.lm.tokenizer

    def ids(**fields):
        [choice] = ask(
            served, path, max_tokens=40, ignore_eos=True, return_tokens=True, speculative=speculative, **fields
        )[1]["choices"]
        return [token["id"] for token in choice["specformer"]["tokens"]]

    token = tokenizer.encode("w7")[0]
    assert set(ids(logit_bias={str(token): 100})) == {token}
    assert len(set(ids(presence_penalty=2, frequency_penalty=2))) > len(set(ids(repetition_penalty=1e-3)))
    assert token not in ids(logit_bias={str(token): -100})
    first = ids()[0]
    assert first not in ids(bad_words=[tokenizer.token_text(first)])


def test_an_answer_has_its_least_tokens(served):
    eos = served.engine.lm.config.eos_ids[0]
    fields = {"logit_bias": {str(eos): 100}, "max_tokens": 12, "return_tokens": True}
    for least in (0, 1, 7):
        answer = ask(served, COMPLETIONS, min_tokens=least, **fields)[1]
        assert answer["usage"]["completion_tokens"] == least + 1
        assert [token["id"] for token in answer["choices"][0]["specformer"]["tokens"]].count(eos) == 1


def test_end_tokens(served):
    """A greedy answer whose end token is passed over is longer, and begins alike; a stop token ends it."""
    tokenizer = served.engine.lm.tokenizer
    whole = ask(served, COMPLETIONS, max_tokens=180)[1]
    longer = ask(served, COMPLETIONS, max_tokens=180, ignore_eos=True)[1]
    assert longer["usage"]["completion_tokens"] == 180 and longer["choices"][0]["finish_reason"] == "length"
    assert longer["choices"][0]["text"].startswith(whole["choices"][0]["text"])
    words = longer["choices"][0]["text"].split()
    [stop] = tokenizer.encode(words[5])
    cut = ask(served, COMPLETIONS, max_tokens=180, ignore_eos=True, stop_token_ids=[stop])[1]["choices"][0]
    assert cut["text"].split() == words[: words.index(words[5])] and cut["finish_reason"] == "stop"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_continuous_usage(served, path):
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = chunks(served, path, stream_options=options, ignore_eos=True, seed=1, temperature=1)
    counts = [chunk["usage"]["completion_tokens"] for chunk in found]
    assert counts == sorted(counts) and counts[0] <= 4 < counts[-1] == 8
    assert found[-1]["choices"] == [] and all(chunk["choices"] for chunk in found[:-1])
    plain = chunks(served, path, stream_options={"include_usage": True})
    assert {chunk["usage"] is None for chunk in plain[:-1]} == {True}


def test_an_assistants_message_may_have_no_content(served):
    """As one has that only called tools; it reads as an empty one."""
    silent = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": []}, MESSAGES[0]]
    empty = [*MESSAGES, {"role": "assistant", "content": ""}, MESSAGES[0]]
    status, answer = ask(served, CHAT, messages=silent)
    assert status == 200 and answer["choices"] == ask(served, CHAT, messages=empty)[1]["choices"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_prompt_beyond_the_context_is_refused_in_the_words_that_clients_know(served, path):
    """litellm and others look for them."""
    long = {"prompt": "w5 " * 200} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "w5 " * 200}]}
    status, answer = ask(served, path, **long)
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    assert answer["error"]["message"].startswith(
        "This model's maximum context length is 192 tokens, but the prompt has"
    )


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_does_not_say_it_is_json(served, kind):
    sent = json.dumps({"model": served.engine.lm.name, "messages": MESSAGES, "max_tokens": 1})
    status, _, answer = served.request("POST", CHAT, sent, {"Content-Type": kind})
    error = json.loads(answer)["error"]
    assert status == 415 and "`Content-Type: application/json`" in error["message"]
    assert served.request("POST", CHAT, sent, {"Content-Type": "application/json; charset=utf-8"})[0] == 200


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}


def test_pages_of_this_machine_may_ask(served):
    for origin in ("http://localhost:5173", "http://127.0.0.1:3000", "http://[::1]:80", "https://localhost"):
        status, headers, _ = served.request("OPTIONS", CHAT, headers=PREFLIGHT | {"Origin": origin})
        assert status == 200 and headers["access-control-allow-origin"] == origin
        status, headers, _ = served.request("GET", "/v1/models", headers={"Origin": origin})
        assert status == 200 and headers["access-control-allow-origin"] == origin
    for origin in ("https://example.com", "http://localhost.example.com", "null", "http://127.0.0.1.example.com:80"):
        status, headers, _ = served.request("OPTIONS", CHAT, headers=PREFLIGHT | {"Origin": origin})
        assert status == 400 and "access-control-allow-origin" not in headers
        assert "access-control-allow-origin" not in served.request("GET", "/health", headers={"Origin": origin})[1]


def test_a_preflight_needs_no_key(engine):
    with running(engine, api_keys=["one"], allow_origins=["https://chat.example.com"]) as served:
        for origin in ("https://chat.example.com", "http://localhost:3000"):
            status, headers, _ = served.request("OPTIONS", CHAT, headers=PREFLIGHT | {"Origin": origin})
            assert status == 200 and headers["access-control-allow-origin"] == origin
            allowed = headers["access-control-allow-headers"].lower()
            assert "authorization" in allowed and "content-type" in allowed
            # A page may read why it was refused.
            status, headers, _ = served.request("GET", "/v1/models", headers={"Origin": origin})
            assert status == 401 and headers["access-control-allow-origin"] == origin
    with running(engine, allow_origins=["*"]) as served:
        assert served.request("GET", "/health", headers={"Origin": "https://a.b"})[1]["access-control-allow-origin"]
