"""Text to token ids and back: a tokenizer.json or a GGUF vocabulary, the model's chat template, streaming."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from specformer_jax import files
from specformer_jax.config import TargetConfig
from specformer_jax.errors import UserError
from specformer_jax.loading import gguf_vocabulary
from specformer_jax.loading.chat_template import ChatTemplate
from specformer_jax.loading.gguf_reader import open_gguf
from specformer_jax.loading.text_stream import BYTE_OF_LETTER, TextStream, byte_tokens

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")  # of an added token in the settings
_CONTEXT = 16  # of the tokens before a text, the most that bear on how it begins


class Tokenizer:
    """A model's vocabulary.

    Attributes:
      eos_ids: the tokens that end an answer.
      vocab_size: one more than the largest token id.
      chat_template: the source of the template for `chat`, None where there is none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: TargetConfig, template: ChatTemplate | None):
        """
        Args:
          backend: the vocabulary as the `tokenizers` package has it.
          config: the model that reads the ids.
          template: how the model writes dialogues down, or None.
        """
        self._backend = backend
        self._rows = config.vocab_size
        self._template = template
        self.eos_ids = config.eos_ids
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        self.chat_template = None if template is None else str(template.source)
        self._added = backend.get_added_tokens_decoder()
        steps = _decoder_steps(backend)
        self._is_byte_level = "ByteLevel" in steps
        self._space = "▁" if "Metaspace" in steps or "Replace" in steps else " "
        self._byte_values = byte_tokens(backend) if "ByteFallback" in steps else {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that differ for vocabularies that give any id another meaning."""
        vocabulary = sorted((id, token) for token, id in self._backend.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]

    def as_json(self) -> str:
        """The vocabulary as a tokenizer.json has it."""
        return self._backend.to_str()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Text -> ids; `special` adds what the model puts around every text, such as a begin token.

        Raises:
          UserError: the text holds half of a surrogate pair, which JSON can write and which is no character, or a token
            that was added to the vocabulary but not to the model.
        """
        return self._encode(text, special).ids

    def encode_answer(self, text: str, answer: str) -> tuple[list[int], list[int]]:
        """The ids of a text and those of what continues it, encoded as one; errors as in `encode`."""
        return self._encode_parts(text + answer, len(text), special=True)

    def _encode_parts(self, text: str, at: int, special: bool) -> tuple[list[int], list[int]]:
        """The ids of a text, in two parts: the second begins with the token that holds the letter at `at`."""
        encoded = self._encode(text, special)
        # What the model puts around a text has no letters: it belongs to the part that it stands in.
        begin = next((i for i, (_, end) in enumerate(encoded.offsets) if end > at), len(encoded.ids))
        return encoded.ids[:begin], encoded.ids[begin:]

    def _encode(self, text: str, special: bool) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is no Unicode: {error}") from error
        encoded = self._backend.encode(text, add_special_tokens=special)
        if (highest := max(encoded.ids, default=0)) >= self._rows:
            raise UserError(
                f"the text uses {self._backend.id_to_token(highest)!r}, which is token {highest}, but the model has"
                f" only {self._rows} tokens: leave it out"
            )
        return encoded

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Ids -> text; special tokens are left out, and bytes that are no UTF-8 become U+FFFD.

        Args:
          after: the ids before them, which the text continues: its first word then keeps the space before it.
        """
        if not after:
            return self._backend.decode([int(id) for id in ids])
        stream = self.stream(after)
        return stream.push(ids) + stream.finish()

    def stream(self, after: Sequence[int] = (), shown: Container[int] = ()) -> TextStream:
        """A decoder for an answer that arrives token by token.

        Args:
          after: as in `decode`.
          shown: special tokens that are text; the others are left out.
        """
        is_silent = lambda id: id not in shown and self._is_silent(id)
        stream = TextStream(self._decode_few, is_silent, self._byte_values)
        context = [id for id in map(int, after[-4 * _CONTEXT :]) if not self._is_silent(id)][-_CONTEXT:]
        while context and self._byte_values.get(context[0], 0) & 0xC0 == 0x80:  # the rest of a character cut in two
            del context[0]
        stream.push(context)
        return stream

    @property
    def special_ids(self) -> frozenset[int]:
        """The special tokens, which `decode` leaves out."""
        return frozenset(id for id, token in self._added.items() if token.special)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a dialogue in the model's own chat template, up to the header of the answer to come.

        Args:
          messages: [{"role": "user", "content": "..."}, ...].

        Raises:
          UserError: the model has no template, or the template refuses these messages.
        """
        return self.encode(self.render(messages), special=False)

    def chat_answer(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """The ids of a dialogue that ends with an answer: those up to the answer, and the answer's with its end token.

        Raises:
          UserError: as `chat`, or the template does not write the answer behind the header of one to come.
        """
        header = self.render(messages[:-1])
        whole = self.render(messages, add_generation_prompt=False)
        if not whole.startswith(header):
            raise UserError("the model's chat template writes an answer otherwise than it begins one")
        prompt, answer = self._encode_parts(whole, len(header), special=False)
        end = next((i for i, id in enumerate(answer, 1) if id in self.eos_ids), len(answer))
        return prompt, answer[:end]  # behind its end token stands what the template puts between messages

    def render(self, messages: Sequence[Mapping[str, Any]], more: Mapping[str, Any] = {}, **ends: bool) -> str:
        """A dialogue as text; arguments and errors are those of `ChatTemplate.render`."""
        if self._template is None:
            raise UserError("this model has no chat template: use --raw to continue the prompt as plain text")
        return self._template.render(messages, more, **ends)

    def token_ids(self, texts: Iterable[str]) -> frozenset[int]:
        """Those of the texts that are tokens, as ids."""
        ids = map(self._backend.token_to_id, texts)
        return frozenset(id for id in ids if id is not None)

    def token_bytes(self, id: int) -> bytes:
        """What one token stands for within a text, the space before a word included; special tokens as written."""
        piece = self._backend.id_to_token(id) or ""
        if id in self._byte_values:
            return bytes([self._byte_values[id]])
        if id not in self._added:
            if self._is_byte_level and all(letter in BYTE_OF_LETTER for letter in piece):
                return bytes(BYTE_OF_LETTER[letter] for letter in piece)
            piece = piece.replace(self._space, " ")
        return piece.encode()

    def token_text(self, id: int) -> str:
        r"""`token_bytes` as OpenAI shows it: bytes that are no text as "bytes:\xe4\xbd", and all byte tokens so."""
        if not self._backend.id_to_token(id):
            return f"token_id:{id}"
        spelled = self.token_bytes(id)
        if id not in self._byte_values:
            try:
                return spelled.decode()
            except UnicodeDecodeError:
                pass
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _decode_few(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)  # of which none comes here unless it is shown

    def _is_silent(self, id: int) -> bool:
        """Whether `decode` leaves the token out: it is special, or none at all."""
        added = self._added.get(id)
        return added.special if added else not self._backend.id_to_token(id)


def load_tokenizer(path: Path, config: TargetConfig) -> Tokenizer:
    """The tokenizer of the model at a `weights.resolve`d path.

    Args:
      path: a directory with tokenizer.json, or a .gguf file (a tokenizer.json beside it is used where the
        vocabulary in the file is of a kind not rebuilt here).

    Raises:
      UserError: there is none, it cannot be read, or it has ids that the model does not have. (Tokens that were added
        to the vocabulary and not to the model are refused where a text uses them.)
    """
    backend, template = _from_gguf(path) if path.suffix == ".gguf" else _from_folder(path)
    highest = max(backend.get_vocab(with_added_tokens=False).values(), default=-1)
    if highest >= config.vocab_size:
        raise UserError(
            f"the tokenizer of {path} has ids up to {highest}, but the model only {config.vocab_size} tokens: it"
            " belongs to another model"
        )
    return Tokenizer(backend, config, template)


def _from_gguf(path: Path) -> tuple[tokenizers.Tokenizer, ChatTemplate | None]:
    file = open_gguf(path)
    found = gguf_vocabulary.rebuild(file)
    if found is not None:
        return found
    if (path.parent / "tokenizer.json").exists():
        return _from_folder(path.parent)
    raise UserError(
        f"{path.name} has a {gguf_vocabulary.kind(file)} vocabulary, which is not rebuilt here: put the model's"
        " tokenizer.json beside it"
    )


def _from_folder(folder: Path) -> tuple[tokenizers.Tokenizer, ChatTemplate | None]:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{folder} has no tokenizer.json: save the model's fast tokenizer there")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing narrower
        raise UserError(f"{file} is not a readable tokenizer ({error})") from error
    backend.no_padding()
    backend.no_truncation()
    settings = _read_settings(folder)
    names = _add_special_tokens(backend, settings, folder)
    template = folder / "chat_template.jinja"
    source = settings.get("chat_template")
    if template.exists():
        try:
            source = template.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{template} cannot be read ({error})") from error
    if isinstance(source, list):  # several named templates
        named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = named[0].get("template") if named else None
    return backend, None if source is None else ChatTemplate(source, names)


def _read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, and what transformers 4 wrote into special_tokens_map.json where that was all it wrote."""
    settings = {}
    if (folder / "tokenizer_config.json").exists():
        settings = files.read_json_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings and (folder / "special_tokens_map.json").exists():
        stored = files.read_json_object(folder / "special_tokens_map.json")
        settings |= {name: value for name, value in stored.items() if value is not None}
    return settings


def _add_special_tokens(backend: tokenizers.Tokenizer, settings: dict[str, Any], folder: Path) -> dict[str, str]:
    """Makes special what the settings call so, as transformers does, and adds what only they list.

    Returns:
      The names under which a chat template reads the special tokens.
    """
    listed = settings.get("added_tokens_decoder") or {}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    try:
        missing = [
            AddedToken(**{flag: entry[flag] for flag in ("content", *_FLAGS) if flag in entry})
            for _, entry in sorted(listed.items(), key=lambda item: int(item[0]))
            if backend.token_to_id(entry["content"]) is None
        ]
        backend.add_tokens(missing)
        named = {name: settings[name] for name in _SPECIAL_NAMES if settings.get(name)}
        named |= {name: value for name, value in settings.items() if name.endswith("_token") and _is_token(value)}
        if isinstance(extra, dict):  # the model's own, by name
            named |= extra
            extra = []
        elif not isinstance(extra, list):
            raise TypeError(f"{extra!r} is no list of tokens")
        names = {name: _content(value) for name, value in named.items()}
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        special = [token for token in (*names.values(), *map(_content, extra)) if token not in added]
        backend.add_special_tokens([token for token in special if backend.token_to_id(token) is not None])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"the special tokens in {folder}'s tokenizer_config.json cannot be read ({error})") from error
    return names


def _is_token(value: Any) -> bool:
    return isinstance(value, str | dict) and bool(value)


def _content(token: str | dict[str, Any]) -> str:
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"{token!r} is no token")
    return text


def _decoder_steps(backend: tokenizers.Tokenizer) -> set[str]:
    """The kinds of the decoder's steps, as tokenizer.json names them."""
    decoder = backend.decoder
    if decoder is None:
        return set()
    stored = json.loads(decoder.__getstate__())
    return {step["type"] for step in stored.get("decoders", [stored])}
