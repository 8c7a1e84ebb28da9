"""The text of an answer as it becomes final: whole characters, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Container, Sequence

from specformer_jax.loading.text_stream import TextStream
from specformer_jax.loading.tokenizer import Tokenizer


def texts(tokenizer: Tokenizer, ids: Sequence[int], shown: Container[int]) -> list[str]:
    """The text that each token of a whole text completes; `shown` as in `Tokenizer.stream`."""
    stream = tokenizer.stream((), shown)
    found = [stream.push([id]) for id in ids]
    return [*found[:-1], found[-1] + stream.finish()] if found else []


class FinalText:
    """Turns tokens into text, up to the first stop string.

    Attributes:
      stopped: whether a stop string has come; what follows it is no part of the answer.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str]):
        self._stream = stream
        self._stops = tuple(stops)
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that became final with this token."""
        return self._release(self._stream.push([token]))

    def finish(self) -> str:
        """The text still held back, when no further token comes."""
        if self.stopped:
            return ""
        piece = self._release(self._stream.finish())
        if self.stopped:
            return piece
        held, self._held = self._held, ""
        return piece + held

    def _release(self, piece: str) -> str:
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]  # the one that is complete first
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`.

    >>> _overlap("a b##", "###")
    2
    """
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
