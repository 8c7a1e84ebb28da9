"""Small tokenizers as files have them, and texts to try them with."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from specformer_jax.config import TargetConfig
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


def small_config(vocab_size: int = 1000) -> TargetConfig:
    return TargetConfig("llama", vocab_size, 8, 1, 1, 1, 8, 8, 64, eos_ids=(2,))


def byte_level(pre: str) -> tokenizers.Tokenizer:
    """A small tokenizer as tokenizer.json of the model families has it, trained on its tests."""
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
    backend.train_from_iterator(
        [Path(__file__).with_name("test_tokenizer.py").read_text(encoding="utf-8"), *TEXTS], trainer
    )
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return backend


def write_gguf(
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


def loaded(folder: Path, backend: tokenizers.Tokenizer, **settings):
    backend.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder, small_config())


def spelled(tokenizer, ids) -> str:
    """The text of the ids, special tokens included."""
    return b"".join(map(tokenizer.token_bytes, ids)).decode()
