"""Text as its tokens arrive: whole characters, the spaces of a text that is continued, and linear work."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from specformer_jax.config import TargetConfig
from specformer_jax.loading.target_config import read_config
from specformer_jax.loading.text_stream import TextStream
from specformer_jax.loading.tokenizer import Tokenizer, load_tokenizer
from tests.loading.vocabularies import TEXTS, byte_level, loaded

SP = Path(__file__).parents[1] / "golden" / "sp"


def _sp() -> Tokenizer:
    return load_tokenizer(SP, read_config(SP))


def _bytes_and_words() -> Tokenizer:
    """GPT-2's bytes and a few longer pieces, some of which end or begin within a character."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["Ġthe", "Ġa", "ðŁ", "ĻĤ", "ä½łå", "¥½"]  # " the", " a", halves of an emoji, one and a half of two
    vocabulary = {piece: id for id, piece in enumerate([*letters, *pieces])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, TargetConfig("llama", 300, 8, 1, 1, 1, 8, 8, 64), None)


SP_TOKENIZER, BYTE_LEVEL = _sp(), _bytes_and_words()


def _streamed(tokenizer: Tokenizer, ids: list[int], cuts: list[int], after=()) -> str:
    stream, pieces = tokenizer.stream(after), []
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    for begin, end in itertools.pairwise(bounds):
        pieces.append(stream.push(ids[begin:end]))
    return "".join(pieces) + stream.finish()


CUTS = st.lists(st.integers(0, 1000), max_size=20)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 2), max_size=120), CUTS)
def test_byte_level_pieces_are_the_text(ids, cuts):
    assert _streamed(BYTE_LEVEL, ids, cuts) == BYTE_LEVEL.decode(ids)


WORDS = st.lists(st.integers(259, 599), min_size=1, max_size=12)
SPECIAL = st.lists(st.sampled_from([0, 1, 2, 700]), max_size=3)
BYTES = st.one_of(
    st.text("日本é🙂 a", max_size=6).map(lambda text: [3 + byte for byte in text.encode()]),
    st.lists(st.integers(3, 258), max_size=8).map(lambda ids: [3 + 0x80, *ids]),  # broken from its first byte on
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(BYTES, SPECIAL, WORDS), max_size=12), st.booleans(), CUTS)
def test_byte_fallback_pieces_are_the_text(parts, words_first, cuts):
    ids = [id for run, special, words in parts for id in ([*words, *special, *run] if words_first else [*run, *words])]
    assert _streamed(SP_TOKENIZER, ids, cuts) == SP_TOKENIZER.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 605), max_size=60), CUTS, st.lists(st.integers(0, 605), max_size=30))
def test_pieces_do_not_depend_on_how_tokens_arrive(ids, cuts, after):
    """Also where byte fallback shows broken bytes after characters that are out, and where a text is continued."""
    assert _streamed(SP_TOKENIZER, ids, cuts, after) == _streamed(SP_TOKENIZER, ids, [], after)
    if after:
        assert SP_TOKENIZER.decode(ids, after) == _streamed(SP_TOKENIZER, ids, cuts, after)


def test_broken_bytes_after_a_character():
    """The character is out; the decoder would take it back."""
    ids = [3 + byte for byte in (*"é".encode(), 0xFF)]
    assert SP_TOKENIZER.decode(ids) == "\ufffd\ufffd\ufffd"
    assert _streamed(SP_TOKENIZER, ids, [1, 2, 3]) == "é\ufffd"


@pytest.mark.parametrize("prompt", ["batch model of", "日本語", "a tab\t", "x" * 50, "🙂" * 20])
@pytest.mark.parametrize("answer", ["peace", " and so", "日本", "s"])
def test_a_continued_text_keeps_its_spaces(prompt, answer):
    """Prompt and answer read as their tokens do together, and an answer of its own has no space before it."""
    before, whole = SP_TOKENIZER.encode(prompt), SP_TOKENIZER.encode(f"{prompt} {answer}")
    common = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    ids = whole[common:]
    assert prompt + " " + answer == SP_TOKENIZER.decode(whole[:common]) + SP_TOKENIZER.decode(ids, whole[:common])
    word = SP_TOKENIZER.encode(answer, special=False)  # begins with a low line
    assert SP_TOKENIZER.decode(word, before) == " " + answer
    assert SP_TOKENIZER.decode(word) == SP_TOKENIZER.decode(word, [1]) == answer


def test_a_character_that_the_prompt_began():
    smile = [SP_TOKENIZER._backend.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    assert SP_TOKENIZER.decode(smile[2:], [300, *smile[:2]]) == "🙂"


@pytest.mark.parametrize(
    ("tokenizer", "token"),
    [
        (SP_TOKENIZER, 3 + 0xFF),  # no byte of any character
        (SP_TOKENIZER, 3 + 0xE4),  # the first byte of one that does not go on
        (SP_TOKENIZER, 1),  # special: no text
        (SP_TOKENIZER, 10_000),  # no token at all: rows of the model that the vocabulary does not use
        (BYTE_LEVEL, BYTE_LEVEL._backend.token_to_id("ÿ")),
        (BYTE_LEVEL, BYTE_LEVEL._backend.token_to_id("ä")),
        (BYTE_LEVEL, BYTE_LEVEL._backend.token_to_id("<end>")),
    ],
)
def test_tokens_without_text_take_linear_work(tokenizer, token):
    decoded = 0

    def decode(ids):
        nonlocal decoded
        decoded += len(ids)
        return tokenizer.decode(ids)

    stream = TextStream(decode, tokenizer._is_silent, tokenizer._byte_values)
    pieces = [stream.push([token]) for _ in range(4000)]
    assert "".join(pieces) + stream.finish() == tokenizer.decode([token] * 4000)
    assert decoded <= 40 * 4000


def _pieces(tokenizer, ids, rng):
    stream, at = tokenizer.stream(), 0
    while at < len(ids):
        count = rng.randint(1, 4)
        yield stream.push(ids[at : at + count])
        at += count
    yield stream.finish()


def _byte_fallback() -> tokenizers.Tokenizer:
    """As SentencePiece models have it: unknown characters are byte tokens, words begin with a low line."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    backend = tokenizers.Tokenizer(
        models.BPE({token: id for id, token in enumerate(tokens)}, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_stream_of_text(kind, tmp_path):
    """No piece holds half a character, and together they are the text, however the tokens arrive."""
    tokenizer = loaded(tmp_path, byte_level("gpt-2") if kind == "byte-level" else _byte_fallback())
    rng = random.Random(0)
    texts = [*TEXTS[:-1], "ab a 日本語 👍🏽 " * 40]
    for text in texts:
        ids = tokenizer.encode(text, special=False)
        pieces = list(_pieces(tokenizer, ids, rng))
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)


def test_stream_of_any_tokens(tmp_path):
    """Bytes that never become a character come out too, as the decoder shows them, at the latest at the end."""
    tokenizer = loaded(tmp_path, byte_level("gpt-2"))
    rng = random.Random(1)
    for _ in range(300):
        top = rng.choice([260, tokenizer.vocab_size])
        ids = [rng.randrange(top) for _ in range(rng.randint(0, 200))]
        assert "".join(_pieces(tokenizer, ids, rng)) == tokenizer.decode(ids)


def test_stream_goes_on_after_characters_taken_back(tmp_path):
    tokenizer = loaded(tmp_path, _byte_fallback())
    rng = random.Random(2)
    for _ in range(100):
        stream = tokenizer.stream()
        for _ in range(40):
            stream.push([rng.randrange(3, 259) for _ in range(rng.randint(1, 4))])
        assert "".join(map(stream.push, [[260], [261], [260]])).endswith("aba")


def test_stream_is_prompt(tmp_path):
    """A whole character is out with the token that completes it."""
    tokenizer = loaded(tmp_path, byte_level("gpt-2"))
    stream = tokenizer.stream()
    assert stream.push(tokenizer.encode("a")) == "a"
    smile = _bytes(tokenizer, "🙂")
    assert [stream.push([id]) for id in smile] == ["", "", "", "🙂"]
    assert stream.push(smile[:2]) == ""
    assert stream.finish() == "\ufffd"


def _bytes(tokenizer, text: str) -> list[int]:
    """The text as one token a byte."""
    spell = {0xF0: "ð", 0x9F: "Ł", 0x99: "Ļ", 0x82: "Ĥ"}  # GPT-2's letters for these bytes
    return [tokenizer._backend.token_to_id(spell[byte]) for byte in text.encode()]
