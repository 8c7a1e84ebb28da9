"""Text as its tokens arrive: no half characters, and for each token the work of a few; how vocabularies spell bytes."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence

import tokenizers

BROKEN = "\ufffd"  # what bytes that are no character decode to
_LONGEST, _KEPT = 32, 8  # tokens that are decoded together at the most, and those left of them as context


class TextStream:
    """Turns ids into text as they arrive, holding back characters of which only a part is there.

    The pieces joined are `decode` of all ids. Where single bytes are tokens (byte fallback), `decode` takes back the
    characters before bytes that turn out to be none; what is out cannot be taken back, and only the rest is shown as
    broken. (`tokenizers` has a DecodeStream, which raises in such cases: huggingface/tokenizers issue 1705.)
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_silent: Callable[[int], bool] = lambda id: False,
        byte_values: Mapping[int, int] = {},
    ):
        """
        Args:
          decode: the text of a few ids.
          is_silent: tells the ids that `decode` leaves out wherever they stand.
          byte_values: the tokens that stand for one byte each, and which.
        """
        self._decode = decode
        self._is_silent = is_silent
        self._byte_values = byte_values
        self._begin()

    def _begin(self) -> None:
        self._ids: list[int] = []  # the newest ids: context for the decoder, and those whose text is not out yet
        self._out = ""  # the part of their text that is out
        self._begin_run()

    def _begin_run(self) -> None:
        self._run: list[int] = []  # byte tokens since the last token of another kind
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._held = 0  # bytes of the run that begin a character
        self._run_is_broken = False

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; may be empty."""
        return "".join(map(self._push, ids))

    def finish(self) -> str:
        """What was held back, as it stands."""
        piece = self._flush()
        self._begin()
        return piece

    def _push(self, id: int) -> str:
        if self._is_silent(id):
            return ""
        if id in self._byte_values:
            return self._push_byte(id)
        piece = ""
        if self._run:
            piece = self._flush()
            self._ids = [*self._ids, *self._run][-_KEPT:]
            self._out = self._decode(self._ids)
            self._begin_run()
        return piece + self._push_token(id)

    def _push_token(self, id: int) -> str:
        self._ids.append(id)
        text = self._decode(self._ids)
        if not text.startswith(self._out):  # a decoder that takes characters back
            self._ids, self._out = [id], ""
            text = self._decode(self._ids)
        # The bytes of a character that the next token may complete decode to one sign; any before it stay broken.
        whole = text.removesuffix(BROKEN)
        piece = whole[len(self._out) :]
        if piece:
            self._out = whole
        if len(self._ids) > _LONGEST:
            held = len(text) - len(self._out)
            self._ids = self._ids[-_KEPT:]
            text = self._decode(self._ids)
            self._out = text[: len(text) - held]
        return piece

    def _push_byte(self, id: int) -> str:
        """`decode` shows a run of bytes as text where all of it is UTF-8, else each byte as broken."""
        piece = "" if self._run else self._flush()
        self._run.append(id)
        if self._run_is_broken:
            return piece + BROKEN
        try:
            character = self._utf8.decode(bytes([self._byte_values[id]]))
        except UnicodeDecodeError:
            held, self._held, self._run_is_broken = self._held, 0, True
            return piece + BROKEN * (held + 1)
        self._held = 0 if character else self._held + 1
        if character and not self._ids and len(self._run) == len(character.encode()):
            return self._decode(self._run)  # at the beginning of the text, where decoders drop a space
        return piece + character

    def _flush(self) -> str:
        if self._run:
            return BROKEN * self._held
        return self._decode(self._ids)[len(self._out) :] if self._ids else ""


def byte_tokens(backend: tokenizers.Tokenizer) -> dict[int, int]:
    """The tokens <0x00> to <0xFF>, and the byte that each stands for."""
    ids = {byte: backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    return {id: byte for byte, id in ids.items() if id is not None}


def _letters() -> dict[str, int]:
    """GPT-2's spelling of bytes: those that print as they are, the others as the letters from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_LETTER = _letters()
