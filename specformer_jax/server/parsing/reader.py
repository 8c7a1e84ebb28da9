"""How a text is read while it arrives.

A form of answers is a generator over a `Source`: it takes text off and yields pieces, and None where it needs more.
So it is written from top to bottom as if all text were there, and gives the same pieces however the text was cut, but
for where one piece of a kind ends and the next begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import TypeVar


@dataclasses.dataclass(frozen=True)
class Said:
    """A part of the answer itself."""

    text: str


@dataclasses.dataclass(frozen=True)
class Thought:
    """A part of what a thinking model thinks first."""

    text: str


@dataclasses.dataclass(frozen=True)
class CallBegin:
    """A call of the tool with this name; its arguments follow."""

    name: str


@dataclasses.dataclass(frozen=True)
class CallArguments:
    """A part of the latest call's arguments, a JSON object as text."""

    text: str


Piece = Said | Thought | CallBegin | CallArguments
T = TypeVar("T")
Steps = Generator[Piece | None, None, T]


class Source:
    """Text that arrives.

    Attributes:
      text: what has come and was not taken off.
      ended: whether no more comes.
    """

    def __init__(self) -> None:
        self.text = ""
        self.ended = False

    def take(self, length: int) -> str:
        """Takes so many characters off the beginning."""
        taken, self.text = self.text[:length], self.text[length:]
        return taken


class Reader:
    """Reads one answer in some form."""

    def __init__(self, form: Callable[[Source], Steps[None]]):
        self._source = Source()
        self._steps = form(self._source)

    def push(self, text: str, ended: bool = False) -> list[Piece]:
        """The pieces that this text completes; all that was held back where the answer has ended."""
        self._source.text += text
        self._source.ended = ended
        pieces = []
        for piece in self._steps:
            if piece is None:
                break
            pieces.append(piece)
        return pieces


def rest(source: Source) -> Steps[None]:
    """All that comes is said."""
    while source.text or not source.ended:
        yield Said(source.take(len(source.text))) if source.text else None


def skip_space(source: Source) -> Steps[str]:
    """Takes whitespace off, up to a letter or the end, and returns it."""
    taken = ""
    while True:
        taken += source.take(len(source.text) - len(source.text.lstrip()))
        if source.text or source.ended:
            return taken
        yield None


def until(source: Source, marker: str, kind: Callable[[str], Piece] = Said) -> Steps[bool]:
    """Gives out the text before a marker, without the whitespace between, and takes the marker off.

    Args:
      source: the text.
      marker: what ends it.
      kind: the piece that the text is.

    Returns:
      False where the text ended without a marker; then all of it was given out.
    """
    while True:
        at = source.text.find(marker)
        if at >= 0:
            if text := source.take(at).rstrip():
                yield kind(text)
            source.take(len(marker))
            return True
        if source.ended:
            if source.text:
                yield kind(source.take(len(source.text)))
            return False
        sure = len(source.text[: len(source.text) - _overlap(source.text, marker)].rstrip())
        if sure:
            yield kind(source.take(sure))
        yield None


def _overlap(text: str, marker: str) -> int:
    """The length of the longest end of `text` that begins the marker.

    >>> _overlap("so <tool", "<tool_call>")
    5
    """
    return next(n for n in range(min(len(text), len(marker) - 1), -1, -1) if text.endswith(marker[:n]))
