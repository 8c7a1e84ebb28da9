"""What stands around the answers: names, ids, logs, tokens, speculation in vLLM's words, and how a prompt is made."""

import json
import logging
import subprocess

import pytest

from specformer_jax.cli import http
from specformer_jax.engine.request import Usage
from specformer_jax.errors import UserError
from specformer_jax.loading.target_config import read_sampling_defaults
from specformer_jax.server.answers.usage import speculation
from specformer_jax.server.draining import Server, Tls
from tests.server.loopback import running
from tests.server.wire.scripted import CONTEXT, ScriptedEngine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def served():
    """A server whose answers the test writes."""
    engine = ScriptedEngine()
    engine.text = "so it is"
    with running(engine) as served:
        yield served


def post(served, path, status=200, **fields):
    """The JSON of an answer."""
    found, _, body = served.request("POST", path, {"model": "scripted"} | fields)
    assert found == status, body
    return json.loads(body)


def asked(served):
    """The prompt that the engine got last, as text with its special tokens."""
    backend = served.engine.lm.tokenizer._backend
    return "".join(backend.id_to_token(id) for id in served.engine.requests[-1].prompt_ids)


def test_a_request_keeps_its_id(served):
    assert served.request("GET", "/health", headers={"X-Request-Id": "mine-5"})[1]["x-request-id"] == "mine-5"
    new = [served.request("GET", path)[1]["x-request-id"] for path in ("/health", "/health", "/nowhere")]
    assert len(set(new)) == 3 and all(len(name) == 32 for name in new)
    assert len(served.request("GET", "/health", headers={"X-Request-Id": "x" * 500})[1]["x-request-id"]) == 32


def test_bad_words_are_sequences_of_tokens(served):
    """With a space before them where that is another word of as many tokens; here it is one token more."""
    encode = served.engine.lm.tokenizer.encode
    post(served, CHAT, messages=[{"role": "user", "content": "x"}], bad_words=["cat", " cat", "o"])
    found = served.engine.requests[-1].sampling_params.bad_words
    assert found == (tuple(encode("cat")), tuple(encode("o")))
    for words, sentence in (([" "], "bad_words"), (["long" * 9], "a bad word must have 1 to 16 tokens")):
        error = post(served, COMPLETIONS, 400, prompt="x", bad_words=words)["error"]
        assert sentence in error["message"]


def test_served_names():
    engine = ScriptedEngine()
    engine.text = "yes"
    with running(engine, names=["small", "gpt-4o-mini"]) as served:
        for path in ("/v1/models", "/v1/models/"):
            cards = json.loads(served.request("GET", path)[2])["data"]
            assert [card["id"] for card in cards] == ["small", "gpt-4o-mini"]
            assert {card["root"] for card in cards} == {"scripted"}
        for name in ("small", "gpt-4o-mini"):
            assert post(served, COMPLETIONS, model=name, prompt="a")["model"] == name
            assert json.loads(served.request("GET", f"/v1/models/{name}")[2])["id"] == name
        error = post(served, COMPLETIONS, 404, model="scripted", prompt="a")["error"]
        assert "this server has 'small' and 'gpt-4o-mini'" in error["message"]


@pytest.mark.parametrize(
    "method, path, use",
    [
        ("POST", "/chat/completions", "use POST /v1/chat/completions"),
        ("POST", "/v1/chat/completion", "use POST /v1/chat/completions"),
        ("POST", "/v1/v1/completions", "use POST /v1/completions"),
        ("POST", "/v1/embeddings", "POST /v1/chat/completions"),
        ("GET", "/model", "/v1/models"),
    ],
)
def test_a_route_that_is_not_there_says_which_to_use(served, method, path, use):
    status, _, body = served.request(method, path, "{}")
    error = json.loads(body)["error"]
    assert status == 404 and use in error["message"] and error["code"] == "unknown_route"


def test_methods(served):
    status, headers, body = served.request("HEAD", "/health")
    assert status == 200 and body == b""
    status, headers, body = served.request("GET", CHAT)
    assert status == 405 and headers["allow"] == "POST" and "use POST" in json.loads(body)["error"]["message"]


def test_the_access_log_leaves_probes_out(caplog):
    server = Server(running, None, 0.0, "info", Tls("cert.pem", None))
    assert (server.config.ssl_certfile, server.config.is_ssl) == ("cert.pem", True)
    access = logging.getLogger("uvicorn.access")
    access.addHandler(caplog.handler)  # uvicorn's loggers do not propagate
    with caplog.at_level(logging.INFO, "uvicorn.access"):
        for path in ("/health", "/v1/models", "/metrics", "/v1/completions"):
            access.info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:5", "GET", path, "1.1", 200)
        access.info("something else")
    access.removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and "/v1/models" in said[0] and "/v1/completions" in said[1]


def test_tls_files_are_checked(tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)

    def check(*flags):
        parser = http.argparse.ArgumentParser()
        http.add_arguments(parser)
        http._check_tls(parser.parse_args(flags))

    check()
    check("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    with pytest.raises(UserError, match="needs the certificate"):
        check("--ssl-keyfile", str(key))
    for flags in ([str(certificate)], [str(tmp_path / "none.pem")], [str(key), "--ssl-keyfile", str(key)]):
        with pytest.raises(UserError, match="cannot be used for HTTPS"):
            check("--ssl-certfile", *flags)


def test_tokens_and_back(served):
    tokenizer = served.engine.lm.tokenizer
    found = post(served, "/tokenize", prompt="hello", return_token_strs=True)
    assert found["token_strs"] == list("hello") and found["count"] == 5 and found["max_model_len"] == CONTEXT
    assert post(served, "/detokenize", tokens=found["tokens"])["prompt"] == "hello"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for fields, text in (
        ({}, "user: a\nassistant: b\nassistant: "),
        ({"add_generation_prompt": False}, "user: a\nassistant: b\n"),
        ({"continue_final_message": True}, "user: a\nassistant: b"),
    ):
        ids = post(served, "/tokenize", messages=messages, **fields)["tokens"]
        assert tokenizer.decode(ids) == text
        post(served, CHAT, messages=messages, **fields)
        assert asked(served) == text and served.engine.requests[-1].raw is ("continue_final_message" in fields)
    info = json.loads(served.request("GET", "/tokenizer_info")[2])
    assert info["vocab_size"] == tokenizer.vocab_size and "add_generation_prompt" in info["chat_template"]
    assert "give either" in post(served, "/tokenize", 400)["error"]["message"]
    assert "vocabulary" in post(served, "/detokenize", 400, tokens=[10**6])["error"]["message"]
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert post(served, CHAT, 400, messages=messages, **both)["error"]["param"] == "continue_final_message"


def test_a_continued_message_keeps_its_spaces(served):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " The sky is "}]
    post(served, CHAT, messages=messages, continue_final_message=True)
    assert asked(served) == "user: a\nassistant:  The sky is "


@pytest.mark.parametrize(
    "fields, thinks",
    [
        ({}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, True),
    ],
)
def test_thinking_is_the_templates_matter(served, fields, thinks):
    post(served, CHAT, messages=[{"role": "user", "content": "a"}], **fields)
    assert ("<think>\n\n</think>" not in asked(served)) == thinks


def test_a_template_takes_no_messages_from_elsewhere(served):
    """`chat_template_kwargs` cannot take the dialogue's place."""
    more = {"messages": [], "add_generation_prompt": False}
    post(served, CHAT, messages=[{"role": "user", "content": "a"}], chat_template_kwargs=more)
    assert asked(served) == "user: a\nassistant: "


def test_prompts_are_cut_at_their_beginning(served):
    post(served, COMPLETIONS, prompt="0123456789", truncate_prompt_tokens=4)
    assert asked(served) == "6789"
    post(served, COMPLETIONS, prompt="ab" * CONTEXT, truncate_prompt_tokens=-1, max_tokens=100)
    assert len(served.engine.requests[-1].prompt_ids) == CONTEXT - 100
    for wrong in (0, -2):
        assert post(served, COMPLETIONS, 400, prompt="a", truncate_prompt_tokens=wrong)["error"]["param"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_no_tokens_may_be_asked_for(served, path):
    question = {"prompt": "abc"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "abc"}]}
    answer = post(served, path, max_tokens=0, n=2, **question)
    assert not served.engine.requests and [c["finish_reason"] for c in answer["choices"]] == ["length"] * 2
    assert answer["usage"]["completion_tokens"] == 0 < answer["usage"]["prompt_tokens"]
    status, _, stream = served.request("POST", path, {"model": "scripted", "max_tokens": 0, "stream": True} | question)
    assert status == 200 and stream.endswith(b"data: [DONE]\n\n")
    if path == COMPLETIONS:
        assert "vocabulary" in post(served, path, 400, prompt=[10**6], max_tokens=0)["error"]["message"]


def test_speculation_in_vllms_words(served):
    """At the root of an answer with one choice, as there; in each choice where there are several."""
    usage = Usage(5, completion_tokens=11, steps=5, drafted_tokens=12, accepted_per_position=(3, 2, 0))
    assert speculation(usage) == {
        "mean_acceptance_length": 2.0,
        "draft_acceptance_rate": 5 / 12,
        "acceptance_histogram": [2, 1, 2, 0],
        "num_spec_steps": 5,
        "num_accepted_draft_tokens": 5,
        "num_draft_tokens": 12,
        "num_spec_tokens": 3,
    }
    assert speculation(Usage(5, completion_tokens=1, accepted_per_position=(0, 0))) is None
    one = post(served, COMPLETIONS, prompt="abc")
    assert one["metrics"]["speculative_decoding"]["acceptance_histogram"] == [0, 0, 3, 0]
    two = post(served, COMPLETIONS, prompt="abc", n=2)
    assert "metrics" not in two
    assert [c["metrics"] for c in two["choices"]] == [one["metrics"]] * 2
    sent = {"model": "scripted", "prompt": "abc", "stream": True, "stream_options": {"include_usage": True}}
    last = served.request("POST", COMPLETIONS, sent)[2].decode().split("\n\n")[-3]
    assert json.loads(last.removeprefix("data: "))["metrics"] == one["metrics"]


def test_the_models_own_sampling(tmp_path):
    file = tmp_path / "generation_config.json"
    assert read_sampling_defaults(tmp_path) == {} == read_sampling_defaults(tmp_path / "model.gguf")
    file.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": None, "eos_token_id": 5}))
    defaults = read_sampling_defaults(tmp_path)
    assert defaults == {"temperature": 0.6, "top_k": 20}
    file.write_text(json.dumps({"temperature": "hot"}))
    with pytest.raises(UserError, match="temperature 'hot' must be a number"):
        read_sampling_defaults(tmp_path)
    engine = ScriptedEngine()
    engine.text = "yes"
    with running(engine, sampling_defaults=defaults) as served:
        for fields, wanted in (({}, (0.6, 20, 1.0)), ({"temperature": 0, "top_k": -1, "top_p": 0.5}, (0, 0, 0.5))):
            post(served, COMPLETIONS, prompt="a", **fields)
            chosen = engine.requests[-1].sampling_params
            assert (chosen.temperature, chosen.top_k, chosen.top_p) == wanted
