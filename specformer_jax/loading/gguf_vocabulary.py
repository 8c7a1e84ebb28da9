"""The vocabulary in a GGUF file as a tokenizer of the `tokenizers` package, and its chat template."""

from __future__ import annotations

import re

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from specformer_jax.errors import UserError
from specformer_jax.loading.chat_template import ChatTemplate
from specformer_jax.loading.gguf_reader import GGUFFile

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # GGUF token types
_SPECIAL_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# What llama.cpp takes for control tokens whatever type an old file gives them.
_LOOKS_LIKE_CONTROL = re.compile(r"<\|[^|<>]+\|>|<｜[^｜<>]+｜>|<end_of_turn>|<end_of_utterance>|_?<EOT>")


def kind(file: GGUFFile) -> str:
    """What the vocabulary in a file is called there: how its tokens were made, and how text is split before."""
    # Files of before the second key existed have it missing for every way of splitting text.
    return f"{file.get('tokenizer.ggml.model')}/{file.get('tokenizer.ggml.pre') or 'unnamed'}"


def rebuild(file: GGUFFile) -> tuple[tokenizers.Tokenizer, ChatTemplate | None] | None:
    """The tokenizer that a file holds, and its chat template if it has one; None for a kind not known here.

    Raises:
      UserError: the vocabulary contradicts itself.
    """
    try:
        return _rebuild(file)
    except Exception as error:  # the package raises nothing narrower
        raise UserError(
            f"the vocabulary in {file.path.name} cannot be rebuilt ({error}): convert the model again, or put its"
            " tokenizer.json into a directory with safetensors"
        ) from error


def _rebuild(file: GGUFFile) -> tuple[tokenizers.Tokenizer, ChatTemplate | None] | None:
    pre, merges = file.get("tokenizer.ggml.pre"), file.get("tokenizer.ggml.merges")
    split = _splits().get(pre)
    if file.get("tokenizer.ggml.model") != "gpt2" or split is None or merges is None:
        return None
    tokens = file.get("tokenizer.ggml.tokens", [])
    types = _types(tokens, file.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens)))
    vocabulary = {token: id for id, (token, type) in enumerate(zip(tokens, types, strict=True)) if type != _UNUSED}
    pairs = [_pair(merge) for merge in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    for token, type in zip(tokens, types, strict=True):
        if type == _CONTROL:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif type == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, special=False, normalized=False)])
    ids = {name: file.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL_IDS.items()}
    names = {name: tokens[id] for name, id in ids.items() if id is not None}
    if file.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and "bos_token" in names:
        bos = names["bos_token"]
        with_bos = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos_token"])]
        )
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), with_bos])
    source = file.get("tokenizer.chat_template")
    return backend, None if source is None else ChatTemplate(source, names)


def _splits() -> dict[str | None, pre_tokenizers.PreTokenizer]:
    """The ways of splitting a text into words, by their name in GGUF."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return {
        "default": gpt2,
        "gpt-2": gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"), bytes_only]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"), bytes_only]),
    }


def _types(tokens: list[str], types: list[int]) -> list[int]:
    return [
        _CONTROL if type == _NORMAL and _LOOKS_LIKE_CONTROL.fullmatch(token) else type
        for token, type in zip(tokens, types, strict=True)
    ]


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
