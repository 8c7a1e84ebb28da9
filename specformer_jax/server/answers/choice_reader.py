"""One choice of an answer, read while it is made."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from specformer_jax.engine.request import Delta
from specformer_jax.server.parsing.reader import CallArguments, CallBegin, Piece, Reader, Thought


class ChoiceReader:
    """Turns the deltas of a choice into the pieces that every API shows in its own words.

    Attributes:
      calls: how many tools the choice has called so far.
      thought_tokens: how many tokens it took before it began to answer, where it thought.
    """

    def __init__(self, reader: Reader, parallel: bool = True):
        """
        Args:
          reader: reads the choice's text.
          parallel: whether it may call several tools; else what comes after the first call is left out.
        """
        self._reader, self._parallel = reader, parallel
        self._begun = 0
        self._thinks = False
        self.calls = self.thought_tokens = 0

    def read(self, delta: Delta) -> list[Piece]:
        """The pieces that a delta completes."""
        pieces = []
        for piece in self._pieces(delta):
            if isinstance(piece, CallBegin):
                self._begun += 1
            if isinstance(piece, CallBegin | CallArguments) and self._begun > 1 and not self._parallel:
                continue
            self.calls += isinstance(piece, CallBegin)
            pieces.append(piece)
        return pieces

    def _pieces(self, delta: Delta) -> Iterator[Piece]:
        for token in delta.tokens:
            pieces = self._reader.push(token.text)
            if pieces:
                self._thinks = isinstance(pieces[-1], Thought)
            self.thought_tokens += self._thinks
            yield from pieces
        if delta.finish_reason is not None:
            yield from self._reader.push("", ended=True)

    def finish_reason(self, delta: Delta) -> str | None:
        """Why the choice ended, in OpenAI's words; None while it goes on."""
        return "tool_calls" if delta.finish_reason == "stop" and self.calls else delta.finish_reason


def new_call_id() -> str:
    """Nine letters and digits, which Mistral's templates insist on."""
    return uuid.uuid4().hex[:9]
