"""Which tokens are special, wherever a model's files say so, and what a vocabulary holds beside the model's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from specformer_jax.errors import UserError
from specformer_jax.loading.target_config import read_config
from specformer_jax.loading.tokenizer import Tokenizer, load_tokenizer
from tests.loading.broken import ODD_VALUES, edit_config

SHOWS = "{{ bos_token }}|{{ eos_token + '' }}|{{ image_token }}"
USER = [{"role": "user", "content": "hi"}]


def _load(folder: Path) -> Tokenizer:
    return load_tokenizer(folder, read_config(folder))


def _settings(folder: Path, file: str = "tokenizer_config.json", **settings) -> None:
    (folder / file).write_text(json.dumps(settings))


def _without_special_tokens(folder: Path) -> None:
    """Makes <s> and </s> plain entries of the vocabulary."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] == "<unk>"]
    (folder / "tokenizer.json").write_text(json.dumps(stored))


def _text(tokenizer: Tokenizer, ids) -> str:
    return "".join(map(tokenizer.token_text, ids))


def test_special_tokens_map_alone(sp):
    """What transformers 4 wrote beside a tokenizer_config.json that does not name them."""
    _without_special_tokens(sp)
    _settings(sp, chat_template=SHOWS)
    with pytest.raises(UserError, match="refuses these messages"):
        _load(sp).chat(USER)
    assert _load(sp).decode([1, 2]) != ""
    names = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    _settings(sp, "special_tokens_map.json", **names)
    tokenizer = _load(sp)
    assert tokenizer.chat(USER).count(1) == tokenizer.chat(USER).count(2) == 1
    assert tokenizer.decode([1, 2]) == ""
    # With added_tokens_decoder the settings are complete, and transformers does not look there either.
    _settings(sp, chat_template="{{ bos_token }}!", added_tokens_decoder={})
    assert 1 not in _load(sp).chat(USER)


def test_additional_special_tokens(sp):
    _settings(
        sp,
        chat_template=SHOWS,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "model"},
        add_bos_token=True,
        added_tokens_decoder={
            "600": {"content": "<tool>", "special": False, "normalized": False},
            "601": {"content": "<think>", "special": True, "lstrip": True},
        },
    )
    edit_config(sp, vocab_size=602)
    tokenizer = _load(sp)
    assert tokenizer.vocab_size == 602
    assert tokenizer.encode("<tool><think>", special=False) == [600, 601]
    assert tokenizer.decode([600, 601]) == "<tool>"
    model = tokenizer._backend.token_to_id("model")
    assert model is None or tokenizer.decode([model]) == ""
    for listed in ("extra_special_tokens", "additional_special_tokens"):
        _settings(sp, **{listed: ["er", {"content": "at"}]})
        er, at = (_load(sp)._backend.token_to_id(token) for token in ("er", "at"))
        assert _load(sp).decode([er, at]) == ""


def test_one_added_token_beyond_the_model(sp):
    """As many fine-tunes have: [PAD] was added to the vocabulary, and the model was not widened."""
    backend = tokenizers.Tokenizer.from_file(str(sp / "tokenizer.json"))
    backend.add_special_tokens(["[PAD]"])
    backend.save(str(sp / "tokenizer.json"))
    tokenizer = _load(sp)
    assert tokenizer.vocab_size == 601
    assert tokenizer.decode(tokenizer.encode("batch model")) == "batch model"
    with pytest.raises(UserError, match=r"the text uses '\[PAD\]', which is token 600, but the model has only 600"):
        tokenizer.encode("batch [PAD]")
    with pytest.raises(UserError, match="the text uses"):
        tokenizer.chat([{"role": "user", "content": "[PAD]"}])
    edit_config(sp, vocab_size=590)
    with pytest.raises(
        UserError, match="has ids up to 599, but the model only 590 tokens: it belongs to another model"
    ):
        _load(sp)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_odd_settings(file, sp):
    """Each key with each odd value: a tokenizer that answers, or one sentence."""
    keys = ["bos_token", "eos_token", "pad_token", "image_token", "chat_template", "added_tokens_decoder"]
    keys += ["extra_special_tokens", "additional_special_tokens"]
    odd = [
        *ODD_VALUES,
        {"content": 5},
        {"7": {"content": 5}},
        {"x": {"content": "a"}},
        {"1": "a"},
        [{"name": "default"}],
    ]
    for key in keys:
        for value in odd:
            _settings(sp, file, **{key: value})
            try:
                tokenizer = _load(sp)
                assert tokenizer.decode(tokenizer.encode("more")) == "more"
                if tokenizer.chat_template is not None:
                    tokenizer.chat(USER)
            except UserError as error:
                assert "\n" not in str(error)
    for content in ("[]", "{", "[" * 100_000):
        (sp / file).write_text(content)
        with pytest.raises(UserError, match=f"{file} (is not valid JSON|holds no JSON object)"):
            _load(sp)


def test_damaged_tokenizer_json(sp):
    """A byte flipped anywhere, or the end cut off: refused with a sentence, or another vocabulary."""
    file = sp / "tokenizer.json"
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for i in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(damaged if i % 2 else whole[: rng.integers(len(whole))])
        try:
            tokenizer = _load(sp)
            tokenizer.decode(tokenizer.encode("batch model"))
        except UserError:
            continue
    file.write_bytes(whole)
    (sp / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="chat_template.jinja cannot be read"):
        _load(sp)


def test_text_of_single_tokens(sp):
    """No two tokens are written alike, and their bytes are those of the text."""
    tokenizer = _load(sp)
    texts = [tokenizer.token_text(id) for id in range(600)]
    assert len(set(texts)) == 600
    word = tokenizer.encode("batch model", special=False)
    assert _text(tokenizer, word) == " batch model"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("日 本", special=False))).decode() == " 日 本"
    assert tokenizer.token_text(3 + 0xE6) == "bytes:\\xe6" and tokenizer.token_bytes(3 + 0xE6) == b"\xe6"
    assert tokenizer.token_text(1) == "<s>" and tokenizer.token_bytes(1) == b"<s>"
    assert tokenizer.token_text(601) == "token_id:601" and tokenizer.token_bytes(601) == b""
