"""What clients see of single tokens, with a tokenizer whose words carry their space and whose bytes are tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specformer_jax.batch import generation
from specformer_jax.config import SamplingParams
from specformer_jax.engine import Engine
from specformer_jax.engine.config import EngineConfig
from specformer_jax.engine.request import Delta, TokenOutput, Usage
from specformer_jax.loading.language_model import load
from specformer_jax.loading.target_config import read_config
from specformer_jax.loading.tokenizer import load_tokenizer
from specformer_jax.server.answers.chat_format import ChatFormat
from specformer_jax.server.answers.choice_format import CompletionFormat, Shown
from specformer_jax.server.answers.choice_reader import ChoiceReader
from specformer_jax.server.parsing.reader import Reader, rest
from tests.server.loopback import running

SP = Path(__file__).parents[1] / "golden" / "sp"
TOKENIZER = load_tokenizer(SP, read_config(SP))


def _logprobs(form, token_id: int, top: list[int]):
    """The log-probabilities of one token, id i having -i."""
    token = TokenOutput(token_id, "", False, -float(token_id), tuple((i, -float(i)) for i in top))
    readers = [[ChoiceReader(Reader(rest))]] if form is ChatFormat else []
    answer = form(TOKENIZER, "sp", Shown(), *readers).whole([[Delta((token,), Usage(1), "stop")]])
    return answer["choices"][0]["logprobs"]


def test_an_entry_for_each_token():
    """Also for the bytes of characters, for words that differ by a space, and for what the vocabulary does not hold."""
    word, spaced = TOKENIZER.encode("s", special=False), TOKENIZER._backend.token_to_id("s")
    top = [0, 1, 2, 3 + 0xE6, 3 + 0x97, 3 + ord("s"), *word, spaced, 300, 610, 611]
    scores = _logprobs(CompletionFormat, 300, top)
    assert list(scores["top_logprobs"][0].values()) == [-float(i) for i in top]
    assert {"bytes:\\xe6", "bytes:\\x73", " s", "s", "<s>", "token_id:610"} <= scores["top_logprobs"][0].keys()
    content = _logprobs(ChatFormat, 300, top)["content"][0]
    assert len({entry["token"] for entry in content["top_logprobs"]}) == len(top)
    byte = next(entry for entry in content["top_logprobs"] if entry["token"] == "bytes:\\xe6")
    assert byte["bytes"] == [0xE6]
    assert bytes(content["bytes"]).decode() == content["token"]


def test_the_chosen_token_is_listed_where_it_is_unlikely():
    assert _logprobs(CompletionFormat, 300, [400, 401])["top_logprobs"][0][TOKENIZER.token_text(300)] == -300
    assert len(_logprobs(CompletionFormat, 300, [400, 401])["top_logprobs"][0]) == 3
    assert len(_logprobs(CompletionFormat, 400, [400, 401])["top_logprobs"][0]) == 2
    assert _logprobs(CompletionFormat, 300, [])["top_logprobs"] == [{TOKENIZER.token_text(300): -300}]
    assert len(_logprobs(ChatFormat, 300, [400, 401])["content"][0]["top_logprobs"]) == 2


def test_tokens_that_are_written_alike(tmp_path):
    """An added token may be a text that the vocabulary spells with one of its own."""
    stored = json.loads((SP / "tokenizer.json").read_text())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    stored["added_tokens"].append(added | {"id": 600, "content": " s"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = load_tokenizer(tmp_path, read_config(SP))
    [spaced] = tokenizer.encode("s", special=False)
    token = TokenOutput(spaced, "", False, -1.0, ((spaced, -1.0), (600, -2.0)))
    [choice] = CompletionFormat(tokenizer, "sp", Shown()).whole([[Delta((token,), Usage(1), "stop")]])["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{" s": -1.0, "token_id:600": -2.0}]


@pytest.fixture(scope="module")
def served():
    config = EngineConfig(rows=2, max_context=128, chunk=32)
    lm = load(str(SP), draft="none", dtype="float32")
    with Engine(lm, config) as engine, running(engine) as served:
        yield served


def _texts(served, path: str, body: dict) -> tuple[str, str]:
    """The text of an answer, whole and as the pieces of a stream."""

    def text(choice, key):
        return choice["text"] if path == "completions" else choice[key].get("content", "")

    status, _, whole = served.request("POST", f"/v1/{path}", body)
    assert status == 200, whole
    _, _, stream = served.request("POST", f"/v1/{path}", body | {"stream": True})
    lines = [line.removeprefix("data: ") for line in stream.decode().splitlines() if line.startswith("data: {")]
    pieces = [text(choice, "delta") for line in lines for choice in json.loads(line)["choices"]]
    return text(json.loads(whole)["choices"][0], "message"), "".join(pieces)


def test_a_completion_continues_its_prompt(served):
    """Whole and streamed alike it begins with the space of its first word, as `serve.py generate --raw` has it."""
    prompt, sampling_params = "batch model of", SamplingParams(max_new_tokens=24)
    lm = served.engine.lm
    [answer] = generation.generate(lm, [prompt], sampling_params=sampling_params, draft_length=0, raw=True)
    asked = {"model": lm.name, "prompt": prompt, "max_tokens": 24, "temperature": 0}
    assert _texts(served, "completions", asked) == (answer.text, answer.text)
    ids = lm.tokenizer.encode(prompt)
    assert prompt + answer.text == lm.tokenizer.decode(ids + answer.token_ids)
    assert lm.tokenizer.token_text(answer.token_ids[0])[0] == answer.text[0] == " "


def test_a_chat_answer_begins_with_its_word(served):
    lm = served.engine.lm
    messages = [{"role": "user", "content": "batch model of"}]
    asked = {"model": lm.name, "messages": messages, "max_completion_tokens": 24, "temperature": 0}
    whole, streamed = _texts(served, "chat/completions", asked)
    assert whole == streamed and not whole.startswith(" ")


def test_twenty_entries_at_every_position(served):
    asked = {"model": served.engine.lm.name, "prompt": "batch model of", "max_tokens": 24, "seed": 1, "logprobs": 20}
    choice = json.loads(served.request("POST", "/v1/completions", asked)[2])["choices"][0]
    scores = choice["logprobs"]
    for token, logprob, top in zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True):
        assert len(top) in (20, 21) and top[token] == logprob


def test_a_template_that_fails_is_the_clients_mistake(served, monkeypatch):
    tokenizer = served.engine.lm.tokenizer
    for source in ("{{ 1 // 0 }}", "{{ {}.pop('x') }}", "{{ 'a'.index('b') }}", "{% if %}"):
        monkeypatch.setattr(tokenizer, "_template", type(tokenizer._template)(source, {}))
        asked = {"model": served.engine.lm.name, "messages": [{"role": "user", "content": "hi"}]}
        status, _, body = served.request("POST", "/v1/chat/completions", asked)
        assert status == 400 and "chat template" in json.loads(body)["error"]["message"]
