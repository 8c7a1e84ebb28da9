"""Text to token ids and back: tokenizer.json or a GGUF vocabulary, the model's chat template, streaming.

Chat templates run as in transformers: sandboxed jinja2 with the same settings and helpers.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from specformer_jax.config import TargetConfig
from specformer_jax.errors import UserError
from specformer_jax.loading.gguf_reader import GGUFFile, open_gguf

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # GGUF token types


class Tokenizer:
    """A model's vocabulary.

    Attributes:
      eos_ids: the tokens that end an answer.
      vocab_size: one more than the largest token id.
      has_chat_template: whether `chat` works.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_ids: tuple[int, ...],
        chat_template: str | None,
        template_names: dict[str, str],
    ):
        """
        Args:
          backend: of the `tokenizers` package.
          chat_template: jinja2 source, or None.
          template_names: what the template may read beside the messages: bos_token, eos_token and the like.
        """
        self._backend = backend
        self._template = None if chat_template is None else _compile(chat_template)
        self._template_names = template_names
        self.eos_ids = eos_ids
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        self.has_chat_template = chat_template is not None

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that differ for vocabularies that give any id another meaning."""
        vocabulary = sorted((id, token) for token, id in self._backend.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Text -> ids; `special` adds what the model puts around every text, such as a begin token.

        Raises:
          UserError: the text holds half of a surrogate pair, which JSON can write and which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is no Unicode: {error}") from error
        return self._backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Ids -> text; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(id) for id in ids], skip_special_tokens=skip_special)

    def chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a dialogue in the model's own chat template.

        Args:
          messages: [{"role": "user", "content": "..."}, ...].
          add_generation_prompt: end with the header of the answer to come.

        Raises:
          UserError: the model has no template, or the template refuses these messages.
        """
        if self._template is None:
            raise UserError("this model has no chat template: use --raw to continue the prompt as plain text")
        try:
            text = self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._template_names,
            )
        except (jinja2.TemplateError, TypeError, AttributeError) as error:
            raise UserError(f"the model's chat template refuses these messages: {error}") from error
        return self.encode(text, special=False)

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder for an answer that arrives token by token."""
        return TextStream(self, skip_special)


class TextStream:
    """Turns ids into text as they arrive, holding back characters of which only a part is there.

    The pieces joined are `decode` of all ids; only a decoder that takes back characters when byte tokens which are
    no UTF-8 follow them (byte fallback) cannot be followed there. (`tokenizers` has a DecodeStream, which raises in
    such cases: huggingface/tokenizers issue 1705.)
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._decode = functools.partial(tokenizer.decode, skip_special=skip_special)
        self._ids: list[int] = []  # the last ones of those that are out, as context for the decoder, and the new ones
        self._out = ""  # the part of their text that is out

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; may be empty."""
        self._ids += ids
        text = self._decode(self._ids)
        if not text.startswith(self._out):  # taken back
            self._ids, self._out = list(ids), ""
            text = self._decode(self._ids)
        whole = text.rstrip("\ufffd")  # the bytes of an unfinished character decode to that
        piece = whole[len(self._out) :]
        if len(whole) > len(self._out):
            self._out = whole
        if len(self._ids) > 64 and whole == text:
            self._shorten(text)
        return piece

    def finish(self) -> str:
        """What was held back, as it stands."""
        piece = self._decode(self._ids)[len(self._out) :]
        self._ids, self._out = [], ""
        return piece

    def _shorten(self, text: str) -> None:
        """Forgets all but a few ids, where these decode to the same text alone as they do among all."""
        tail = self._ids[-8:]
        context = self._decode(tail)
        if context and text.endswith(context) and "\ufffd" not in context:
            self._ids, self._out = tail, context


def load_tokenizer(path: Path, config: TargetConfig) -> Tokenizer:
    """The tokenizer of the model at a `weights.resolve`d path.

    Args:
      path: a directory with tokenizer.json, or a .gguf file (a tokenizer.json beside it is used where the
        vocabulary in the file is of a kind not rebuilt here).

    Raises:
      UserError: there is none, it cannot be read, or it has ids that the model does not have.
    """
    tokenizer = _from_gguf(path, config) if path.suffix == ".gguf" else _from_folder(path, config)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer of {path} has ids up to {tokenizer.vocab_size - 1}, but the model only {config.vocab_size}"
            " tokens: it belongs to another model"
        )
    return tokenizer


def _from_folder(folder: Path, config: TargetConfig) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{folder} has no tokenizer.json: save the model's fast tokenizer there")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing narrower
        raise UserError(f"{file} is not a readable tokenizer ({error})") from error
    backend.no_padding()
    backend.no_truncation()
    settings = _read_settings(folder / "tokenizer_config.json")
    template = folder / "chat_template.jinja"
    source = template.read_text(encoding="utf-8") if template.exists() else settings.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    names = {name: _content(value) for name, value in settings.items() if name.endswith("_token") and value}
    return Tokenizer(backend, config.eos_ids, source, names)


def _from_gguf(path: Path, config: TargetConfig) -> Tokenizer:
    file = open_gguf(path)
    # Files of before this key existed have it missing for every way of splitting text.
    kind, pre = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    tokens = file.get("tokenizer.ggml.tokens")
    backend = _byte_level_bpe(file, tokens, pre) if kind == "gpt2" else None
    if backend is None:
        if (path.parent / "tokenizer.json").exists():
            return _from_folder(path.parent, config)
        raise UserError(
            f"{path.name} has a {kind}/{pre or 'unnamed'} vocabulary, which is not rebuilt here: put the model's"
            " tokenizer.json beside it"
        )
    ids = {name: file.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL_IDS.items()}
    names = {name: tokens[id] for name, id in ids.items() if id is not None}
    if file.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and "bos_token" in names:
        bos = names["bos_token"]
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos_token"])]
                ),
            ]
        )
    return Tokenizer(backend, config.eos_ids, file.get("tokenizer.chat_template"), names)


_SPECIAL_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _byte_level_bpe(file: GGUFFile, tokens: list[str], pre: str | None) -> tokenizers.Tokenizer | None:
    """A GPT-2 style tokenizer from GGUF metadata, or None for a way of splitting text not known here."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = {
        "default": gpt2,
        "gpt-2": gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"), bytes_only]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"), bytes_only]),
    }.get(pre or "")
    merges = file.get("tokenizer.ggml.merges")
    if split is None or merges is None:
        return None
    types = file.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    vocabulary = {token: id for id, (token, type) in enumerate(zip(tokens, types, strict=True)) if type != _UNUSED}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
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
    return backend


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error})") from error


def _content(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks what an assistant wrote, for training; the text is the same without it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> jinja2.Template:
    """The template in transformers' surroundings; its code comes from a stranger, hence the sandbox."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the model's chat template cannot be read ({error}): use --raw") from error
