"""Tokenizers from tokenizer.json and from GGUF metadata, chat templates."""

from __future__ import annotations

import pytest
from tokenizers import processors

from specformer_jax.errors import UserError
from specformer_jax.loading.gguf_reader import open_gguf
from specformer_jax.loading.target_config import read_config
from specformer_jax.loading.tokenizer import load_tokenizer
from tests.loading.vocabularies import (
    CHATML,
    QWEN2_SPLIT,
    TEXTS,
    byte_level,
    loaded,
    small_config,
    spelled,
    write_gguf,
)

# The two sources


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_and_tokenizer_json_agree(pre, tmp_path):
    backend = byte_level(pre)
    if pre == "llama-bpe":  # the one family that begins every text with a token
        template = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    wanted = loaded(tmp_path, backend)
    (tmp_path / "gguf").mkdir()
    got = load_tokenizer(write_gguf(tmp_path / "gguf" / "model.gguf", backend, pre), small_config())
    assert (got.vocab_size, got.fingerprint, got.eos_ids) == (wanted.vocab_size, wanted.fingerprint, (2,))
    for text in TEXTS:
        for special in (True, False):
            ids = got.encode(text, special)
            assert ids == wanted.encode(text, special), text
            assert got.decode(ids) == wanted.decode(ids), text
            assert spelled(got, ids) == spelled(wanted, ids), text
    assert (got.encode("x")[0] == 0) == (pre == "llama-bpe")
    assert got.decode(got.encode("<|im_start|><tool_call>")) == "<tool_call>"


def test_fingerprint_tells_vocabularies_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    backend = byte_level("gpt-2")
    first = loaded(tmp_path / "a", backend)
    backend.add_tokens(["another"])
    assert first.fingerprint != loaded(tmp_path / "b", backend).fingerprint
    assert len(first.fingerprint) == 16


@pytest.mark.parametrize(("pre", "kind"), [("command-r", "gpt2"), ("default", "llama"), (None, "gpt2")])
def test_vocabularies_not_rebuilt(pre, kind, tmp_path):
    backend = byte_level("gpt-2")
    file = write_gguf(tmp_path / "model.gguf", backend, pre, kind)
    with pytest.raises(
        UserError, match=f"{kind}/{pre or 'unnamed'} vocabulary.*put the model's tokenizer.json beside it"
    ):
        load_tokenizer(file, small_config())
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(file, small_config()).encode("hi") == backend.encode("hi").ids


@pytest.mark.parametrize("types", ["normal", None])
def test_old_gguf_files_type_no_token(types, tmp_path):
    """What looks like a control token is one, as llama.cpp has it: else chat tokens are split into letters."""
    backend = byte_level("gpt-2")
    file = write_gguf(tmp_path / "model.gguf", backend, "gpt-2", chat_template=CHATML, types=types)
    tokenizer = load_tokenizer(file, small_config())
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
    file = open_gguf(write_gguf(tmp_path / "model.gguf", byte_level("gpt-2"), "gpt-2"))
    types = file.get("tokenizer.ggml.token_type")
    if changes == {"tokenizer.ggml.token_type": "unused"}:
        changes = {"tokenizer.ggml.token_type": [5 if i == 400 else type for i, type in enumerate(types)]}
    file._metadata |= changes
    with pytest.raises(UserError, match="the vocabulary in model.gguf cannot be rebuilt") as caught:
        load_tokenizer(file.path, small_config())
    assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_is_refused(tmp_path):
    tokenizer = loaded(tmp_path, byte_level("gpt-2"))
    assert tokenizer.decode(tokenizer.encode("a \U0001f600")) == "a \U0001f600"
    with pytest.raises(UserError, match="is no Unicode"):
        tokenizer.encode("a \ud800")


def test_tokenizer_that_does_not_match(tmp_path):
    backend = byte_level("gpt-2")
    backend.save(str(tmp_path / "tokenizer.json"))
    size = backend.get_vocab_size()
    assert load_tokenizer(tmp_path, small_config(size)).vocab_size == size
    with pytest.raises(UserError, match=f"has ids up to {size - 2}, but the model only {size - 2} tokens"):
        load_tokenizer(tmp_path, small_config(size - 2))


def test_broken_files(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path, small_config())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json is not a readable tokenizer"):
        load_tokenizer(tmp_path, small_config())
    (tmp_path / "tokenizer_config.json").write_text("{")
    byte_level("gpt-2").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="tokenizer_config.json is not valid JSON"):
        load_tokenizer(tmp_path, small_config())


# The built-in model


def test_builtin_tokenizer(builtin_path):
    tokenizer = load_tokenizer(builtin_path, read_config(builtin_path))
    assert (tokenizer.vocab_size, tokenizer.eos_ids) == (49152, (2,)) and "<|im_start|>" in tokenizer.chat_template
    ids = tokenizer.chat([{"role": "user", "content": "Name three primary colours."}])
    assert spelled(tokenizer, ids) == (
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
            assert spelled(tokenizer, tokenizer.encode(text)) == text


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
    tokenizer = loaded(tmp_path, byte_level("gpt-2"))
    assert tokenizer.chat_template is None
    with pytest.raises(UserError, match="no chat template: use --raw"):
        tokenizer.chat([{"role": "user", "content": "hi"}])


def test_where_the_template_comes_from(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    backend = byte_level("gpt-2")
    tokenizer = loaded(tmp_path, backend, chat_template=CHATML)
    ids = tokenizer.chat(messages)
    assert spelled(tokenizer, ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == 1  # the template's special tokens are tokens, not text

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
    assert loaded(tmp_path, backend, chat_template=named).chat(messages) == ids
    (tmp_path / "chat_template.jinja").write_text("a file of its own")
    tokenizer = loaded(tmp_path, backend, chat_template=CHATML)
    assert tokenizer.decode(tokenizer.chat(messages)) == "a file of its own"
    (tmp_path / "gguf").mkdir()
    file = write_gguf(tmp_path / "gguf" / "model.gguf", backend, "gpt-2", chat_template=CHATML)
    assert load_tokenizer(file, small_config()).chat(messages) == ids


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
    tokenizer = loaded(tmp_path, byte_level("gpt-2"), **settings)
    messages = [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "yes"}]
    assert spelled(tokenizer, tokenizer.chat(messages)) == text


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
    tokenizer = loaded(tmp_path, byte_level("gpt-2"), chat_template=template)
    with pytest.raises(UserError, match="chat template refuses these messages: "):
        tokenizer.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("template", ["{% if %}", "{{ x | no_such_filter }}", 5, {"a": 1}])
def test_unreadable_template(template, tmp_path):
    """It is compiled when it is first needed: plain text is continued without it."""
    tokenizer = loaded(tmp_path, byte_level("gpt-2"), chat_template=template)
    assert tokenizer.decode(tokenizer.encode("hi")) == "hi"
    for _ in range(2):
        with pytest.raises(UserError, match="chat template cannot be read .*: use --raw"):
            tokenizer.chat([{"role": "user", "content": "hi"}])
