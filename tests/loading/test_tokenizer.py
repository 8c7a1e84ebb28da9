"""Tokenizers from tokenizer.json and from GGUF metadata, chat templates, streaming."""

from __future__ import annotations

import json
import random
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from specformer_jax.config import TargetConfig
from specformer_jax.errors import UserError
from specformer_jax.loading.gguf_reader import open_gguf
from specformer_jax.loading.target_config import read_config
from specformer_jax.loading.tokenizer import load_tokenizer

TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  two  spaces, a\ttab,\r\n\n a line \n  and trailing   ",
    "I'm sure they'll say it's FINE, DON'T you think? We've SEEN it.",
    "naïve façade, café and cafe\u0301, Ångström, ﬁne",
    "你好，世界！日本語のテキスト, 한국어, Привет, مرحبا",
    "👍🏽 👩‍👩‍👧 🇩🇪 \u200b\ufeff",
    "12345 and 3.14159, 1,000,000: x2 = y²; ٣٤",
    "def f(x):\n    return x ** 2  # square\n\n\n17",
    "<|im_start|>user\nhi<|im_end|><tool_call>",
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _config(vocab_size: int = 1000) -> TargetConfig:
    return TargetConfig("llama", vocab_size, 8, 1, 1, 1, 8, 8, 64, eos_ids=(2,))


def _byte_level(pre: str) -> tokenizers.Tokenizer:
    """A small tokenizer as tokenizer.json of the model families has it, trained on this file."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def split(pattern):
        return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")

    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = {
        "gpt-2": gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "llama-bpe": pre_tokenizers.Sequence([split(LLAMA3_SPLIT), bytes_only]),
        "qwen2": pre_tokenizers.Sequence([split(QWEN2_SPLIT), bytes_only]),
    }[pre]
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in ("<|bos|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8"), *TEXTS], trainer)
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return backend


def _write_gguf(
    file: Path, backend: tokenizers.Tokenizer, pre: str | None, kind: str = "gpt2", types: str | None = "", **more
) -> Path:
    """A file without tensors; `types` "normal" gives every token that type, None leaves the types out."""
    model = json.loads(backend.to_str())["model"]
    by_id = sorted((id, token) for token, id in backend.get_vocab().items())
    added = backend.get_added_tokens_decoder()
    kinds = [1 if id not in added or types else 3 if added[id].special else 4 for id, _ in by_id]
    tokens = [token for _, token in by_id] + ["[PAD]"] * 5  # unused, as converters fill up to the embedding's rows
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if types is not None:
        writer.add_token_types(kinds + [5] * 5)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def _folder(folder: Path, backend: tokenizers.Tokenizer, **settings):
    backend.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder, _config())


def _spelled(tokenizer, ids) -> str:
    """The text of the ids, special tokens included."""
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


# The two sources


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_and_tokenizer_json_agree(pre, tmp_path):
    backend = _byte_level(pre)
    if pre == "llama-bpe":  # the one family that begins every text with a token
        template = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    wanted = _folder(tmp_path, backend)
    (tmp_path / "gguf").mkdir()
    got = load_tokenizer(_write_gguf(tmp_path / "gguf" / "model.gguf", backend, pre), _config())
    assert (got.vocab_size, got.fingerprint, got.eos_ids) == (wanted.vocab_size, wanted.fingerprint, (2,))
    for text in TEXTS:
        for special in (True, False):
            ids = got.encode(text, special)
            assert ids == wanted.encode(text, special), text
            assert got.decode(ids) == wanted.decode(ids), text
            assert _spelled(got, ids) == _spelled(wanted, ids), text
    assert (got.encode("x")[0] == 0) == (pre == "llama-bpe")
    assert got.decode(got.encode("<|im_start|><tool_call>")) == "<tool_call>"


def test_fingerprint_tells_vocabularies_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    backend = _byte_level("gpt-2")
    first = _folder(tmp_path / "a", backend)
    backend.add_tokens(["another"])
    assert first.fingerprint != _folder(tmp_path / "b", backend).fingerprint
    assert len(first.fingerprint) == 16


@pytest.mark.parametrize(("pre", "kind"), [("command-r", "gpt2"), ("default", "llama"), (None, "gpt2")])
def test_vocabularies_not_rebuilt(pre, kind, tmp_path):
    backend = _byte_level("gpt-2")
    file = _write_gguf(tmp_path / "model.gguf", backend, pre, kind)
    with pytest.raises(
        UserError, match=f"{kind}/{pre or 'unnamed'} vocabulary.*put the model's tokenizer.json beside it"
    ):
        load_tokenizer(file, _config())
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(file, _config()).encode("hi") == backend.encode("hi").ids


@pytest.mark.parametrize("types", ["normal", None])
def test_old_gguf_files_type_no_token(types, tmp_path):
    """What looks like a control token is one, as llama.cpp has it: else chat tokens are split into letters."""
    backend = _byte_level("gpt-2")
    file = _write_gguf(tmp_path / "model.gguf", backend, "gpt-2", chat_template=CHATML, types=types)
    tokenizer = load_tokenizer(file, _config())
    ids = tokenizer.chat([{"role": "user", "content": "hi"}])
    assert ids[0] == 1 and ids.count(1) == 2 and ids.count(2) == 1
    assert tokenizer.decode(ids) == "user\nhi\nassistant\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.token_type": "unused"},
        {"tokenizer.ggml.token_type": [1]},
        {"tokenizer.ggml.token_type": 1},
        {"tokenizer.ggml.tokens": None},
        {"tokenizer.ggml.tokens": [1, 2]},
        {"tokenizer.ggml.merges": ["a"]},
        {"tokenizer.ggml.merges": [5]},
        {"tokenizer.ggml.bos_token_id": 10**6},
        {"tokenizer.ggml.bos_token_id": "<s>"},
        {"tokenizer.ggml.pre": ["gpt-2"]},
    ],
)
def test_gguf_vocabulary_that_contradicts_itself(changes, tmp_path):
    """Among them a merge that makes a token typed UNUSED."""
    file = open_gguf(_write_gguf(tmp_path / "model.gguf", _byte_level("gpt-2"), "gpt-2"))
    types = file.get("tokenizer.ggml.token_type")
    if changes == {"tokenizer.ggml.token_type": "unused"}:
        changes = {"tokenizer.ggml.token_type": [5 if i == 400 else type for i, type in enumerate(types)]}
    file._metadata |= changes
    with pytest.raises(UserError, match="the vocabulary in model.gguf cannot be rebuilt") as caught:
        load_tokenizer(file.path, _config())
    assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_is_refused(tmp_path):
    tokenizer = _folder(tmp_path, _byte_level("gpt-2"))
    assert tokenizer.decode(tokenizer.encode("a \U0001f600")) == "a \U0001f600"
    with pytest.raises(UserError, match="is no Unicode"):
        tokenizer.encode("a \ud800")


def test_tokenizer_that_does_not_match(tmp_path):
    backend = _byte_level("gpt-2")
    backend.save(str(tmp_path / "tokenizer.json"))
    size = backend.get_vocab_size()
    assert load_tokenizer(tmp_path, _config(size)).vocab_size == size
    with pytest.raises(UserError, match=f"has ids up to {size - 2}, but the model only {size - 2} tokens"):
        load_tokenizer(tmp_path, _config(size - 2))


def test_broken_files(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path, _config())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json is not a readable tokenizer"):
        load_tokenizer(tmp_path, _config())
    (tmp_path / "tokenizer_config.json").write_text("{")
    _byte_level("gpt-2").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="tokenizer_config.json is not valid JSON"):
        load_tokenizer(tmp_path, _config())


# The built-in model


def test_builtin_tokenizer(builtin_path):
    tokenizer = load_tokenizer(builtin_path, read_config(builtin_path))
    assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.has_chat_template) == (49152, (2,), True)
    ids = tokenizer.chat([{"role": "user", "content": "Name three primary colours."}])
    assert _spelled(tokenizer, ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n"
    )
    system = [
        1,
        9690,
        198,
        2683,
        359,
        253,
        5356,
        5646,
        11173,
        3365,
        3511,
        308,
        34519,
        28,
        7018,
        411,
        407,
        19712,
        8182,
        2,
    ]
    assert ids == [*system, 198, 1, 4093, 198, 5820, 1296, 3003, 14797, 30, 2, 198, 1, 520, 9531, 198]
    # Each digit is a word of its own, and what stands before it is split without it: "\n\n" stays whole.
    assert tokenizer.encode("Is it prime?\n\n17") == [4182, 357, 9552, 47, 1116, 33, 39]
    for text in TEXTS:
        if "\u0301" not in text:
            assert _spelled(tokenizer, tokenizer.encode(text)) == text


@pytest.mark.parity
def test_builtin_tokenizer_against_transformers(builtin_path):
    """Its rebuilt tokenizer does not set digits apart, so texts with digits are left out."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(builtin_path.parent, gguf_file=builtin_path.name)
    ours = load_tokenizer(builtin_path, read_config(builtin_path))
    for text in TEXTS:
        if not any(character.isnumeric() for character in text):
            assert ours.encode(text) == theirs(text).input_ids, text
            messages = [{"role": "user", "content": text}]
            assert ours.chat(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True).input_ids


@pytest.mark.parity
def test_split_pattern_is_that_of_transformers():
    qwen2 = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    assert qwen2.PRETOKENIZE_REGEX == QWEN2_SPLIT


# Chat templates


def test_no_chat_template(tmp_path):
    tokenizer = _folder(tmp_path, _byte_level("gpt-2"))
    assert not tokenizer.has_chat_template
    with pytest.raises(UserError, match="no chat template: use --raw"):
        tokenizer.chat([{"role": "user", "content": "hi"}])


def test_where_the_template_comes_from(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    backend = _byte_level("gpt-2")
    tokenizer = _folder(tmp_path, backend, chat_template=CHATML)
    ids = tokenizer.chat(messages)
    assert _spelled(tokenizer, ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == 1  # the template's special tokens are tokens, not text

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
    assert _folder(tmp_path, backend, chat_template=named).chat(messages) == ids
    (tmp_path / "chat_template.jinja").write_text("a file of its own")
    tokenizer = _folder(tmp_path, backend, chat_template=CHATML)
    assert tokenizer.decode(tokenizer.chat(messages)) == "a file of its own"
    (tmp_path / "gguf").mkdir()
    file = _write_gguf(tmp_path / "gguf" / "model.gguf", backend, "gpt-2", chat_template=CHATML)
    assert load_tokenizer(file, _config()).chat(messages) == ids


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ eos_token }}", "<|bos|><|im_end|>"),
        (
            "{%- for m in messages %}\n    {% if loop.index0 == 1 %}{% break %}{% endif %}\n{{ m.role }}\n{% endfor %}",
            "user\n",
        ),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<é>"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1) }}", '{\n "b": 1,\n "a": 2\n}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "<é>!"),
        ("{{ strftime_now('%Y')[:2] }}", "20"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% if tools is none and documents is none and not undefined_thing %}plain{% endif %}", "plain"),
    ],
)
def test_template_surroundings(template, text, tmp_path):
    settings = {"chat_template": template, "bos_token": {"content": "<|bos|>"}, "eos_token": "<|im_end|>"}
    tokenizer = _folder(tmp_path, _byte_level("gpt-2"), **settings)
    messages = [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "yes"}]
    assert _spelled(tokenizer, tokenizer.chat(messages)) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ '%d' | format(messages[0].content) }}",
        "{{ {}.pop('tools') }}",
        "{{ 'abc'.index('z') }}",
        "{{ strftime_now(5) }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_template_that_refuses(template, tmp_path):
    tokenizer = _folder(tmp_path, _byte_level("gpt-2"), chat_template=template)
    with pytest.raises(UserError, match="chat template refuses these messages: "):
        tokenizer.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("template", ["{% if %}", "{{ x | no_such_filter }}", 5, {"a": 1}])
def test_unreadable_template(template, tmp_path):
    """It is compiled when it is first needed: plain text is continued without it."""
    tokenizer = _folder(tmp_path, _byte_level("gpt-2"), chat_template=template)
    assert tokenizer.decode(tokenizer.encode("hi")) == "hi"
    for _ in range(2):
        with pytest.raises(UserError, match="chat template cannot be read .*: use --raw"):
            tokenizer.chat([{"role": "user", "content": "hi"}])


# Streaming


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
    tokenizer = _folder(tmp_path, _byte_level("gpt-2") if kind == "byte-level" else _byte_fallback())
    rng = random.Random(0)
    texts = [*TEXTS[:-1], "ab a 日本語 👍🏽 " * 40]
    for text in texts:
        ids = tokenizer.encode(text, special=False)
        pieces = list(_pieces(tokenizer, ids, rng))
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)


def test_stream_of_any_tokens(tmp_path):
    """Bytes that never become a character come out too, as the decoder shows them, at the latest at the end."""
    tokenizer = _folder(tmp_path, _byte_level("gpt-2"))
    rng = random.Random(1)
    for _ in range(300):
        top = rng.choice([260, tokenizer.vocab_size])
        ids = [rng.randrange(top) for _ in range(rng.randint(0, 200))]
        assert "".join(_pieces(tokenizer, ids, rng)) == tokenizer.decode(ids)


def test_stream_goes_on_after_characters_taken_back(tmp_path):
    tokenizer = _folder(tmp_path, _byte_fallback())
    rng = random.Random(2)
    for _ in range(100):
        stream = tokenizer.stream()
        for _ in range(40):
            stream.push([rng.randrange(3, 259) for _ in range(rng.randint(1, 4))])
        assert "".join(map(stream.push, [[260], [261], [260]])).endswith("aba")


def test_stream_is_prompt(tmp_path):
    """A whole character is out with the token that completes it."""
    tokenizer = _folder(tmp_path, _byte_level("gpt-2"))
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
