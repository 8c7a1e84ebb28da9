"""Prompts read lately, kept as one-row states: a prompt that begins like one of them need not read that part again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from specformer_jax.decoding.state import DecodeState
from specformer_jax.engine.compiled_steps import CompiledSteps

WORTH_A_COPY = 32  # tokens of reading that must be saved, padding included, before a row is copied


@dataclasses.dataclass(eq=False)
class Prefix:
    """A one-row state and the prompt tokens it has read.

    Attributes:
      state: the one-row state, whose cache holds `tokens`.
      tokens: the part of a prompt that was read; the drafter's layer still waits for the token after its last one.
      busy: whether a request is using the row.
      used: when a request last used the row, by the cache's own clock.
    """

    state: DecodeState
    tokens: Int32[np.ndarray, " T"]
    busy: bool = False
    used: int = 0


class PrefixCache:
    """A fixed number of rows, reused least recently used first."""

    def __init__(self, compiled_steps: CompiledSteps, rows: int):
        self._compiled_steps = compiled_steps
        self._clock = itertools.count(1)
        self._rows = rows
        self._kept: list[Prefix] = []

    def take(self, prompt: Sequence[int]) -> tuple[Prefix, int]:
        """A row to read this prompt in, and how many of its positions need not be read.

        The last shared token is read again: the drafter's context of a position depends on the token after it, too.

        Raises:
          RuntimeError: every row is busy.
        """
        ids = np.asarray(prompt, np.int32)
        best = max(self._kept, key=lambda kept: _shared(kept.tokens, ids), default=None)
        shared = 0 if best is None else _shared(best.tokens, ids)
        saved = self._compiled_steps.padded(len(ids)) - self._compiled_steps.padded(len(ids) - max(0, shared - 1))
        if best is not None and saved and not best.busy and shared == len(best.tokens):
            row = best  # the prompt goes on where that one ended
        elif best is not None and saved >= WORTH_A_COPY:
            best.used = next(self._clock)
            state = best.state
            row = self._free()
            row.state = self._compiled_steps.copy(state)
        else:
            row, shared = self._free(), 0
        row.busy, row.used, row.tokens = True, next(self._clock), ids[:shared]
        return row, max(0, shared - 1)

    def _free(self) -> Prefix:
        if len(self._kept) < self._rows:
            self._kept.append(Prefix(self._compiled_steps.empty(1), np.zeros(0, np.int32)))
            return self._kept[-1]
        idle = [kept for kept in self._kept if not kept.busy]
        if not idle:
            raise RuntimeError("every row for prompts is busy")
        return min(idle, key=lambda kept: kept.used)


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = min(len(a), len(b))
    differ = np.nonzero(a[:length] != b[:length])[0]
    return int(differ[0]) if len(differ) else length
