"""An answer in the making against its grammar: which tokens may come next, and after each draft of a chain.

The masks are those of the drafts that are about to be verified, so an answer has the tokens that it has without drafts.
A draft that breaks the grammar is not verified; in its place, and behind the last, stands what the grammar leaves no
choice about.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt32

from specformer_jax.errors import UserError
from specformer_jax.grammars.grammar import llguidance
from specformer_jax.loading.language_model import LanguageModel

KEPT = 64  # grammars that are kept as they were read


class CheckedDrafts(NamedTuple):
    """The drafts that a row's next step verifies, checked against its grammar.

    Attributes:
      drafts: token ids, each allowed after those before it.
      bits: which tokens are allowed before the first draft and after each; see `decoding.processors.Allowed`.
    """

    drafts: list[int]
    bits: UInt32[np.ndarray, "1+drafts words"]


class Thoughts(NamedTuple):
    """What a thinking model thinks before it answers, which follows no grammar.

    Attributes:
      begin, end: the tokens around it.
      begun: whether the prompt has begun it; else the model may.
    """

    begin: int
    end: int
    begun: bool


class Matchers:
    """Makes the matchers of one model's vocabulary, which is prepared when the first is asked for."""

    def __init__(self, lm: LanguageModel, forces: bool = True):
        """
        Args:
          lm: the model.
          forces: whether what a grammar leaves no choice about is drafted.
        """
        self._lm, self._forces = lm, forces
        self._read = functools.lru_cache(KEPT)(self._read_anew)

    @functools.cached_property
    def vocabulary(self) -> Any:
        """The vocabulary as `llguidance` has it."""
        config = self._lm.config
        settings = self._lm.tokenizer.as_json()
        try:
            return llguidance().LLTokenizer(settings, n_vocab=config.vocab_size, eos_token=sorted(config.eos_ids))
        except ValueError as error:
            raise UserError(f"grammars cannot be followed in this target's vocabulary: {error}") from error

    def of(self, grammar: str, thoughts: Thoughts | None = None) -> Matcher:
        """A matcher at the beginning of an answer, which follows the grammar behind its thoughts, where it has any.

        Raises:
          UserError: it is no grammar, or no text follows it.
        """
        return Matcher(self._read(grammar).deep_copy(), self.vocabulary, thoughts, self._forces)

    def _read_anew(self, grammar: str) -> Any:
        failed, messages = llguidance().LLMatcher.validate_grammar_with_warnings(grammar, self.vocabulary)
        if failed:
            raise UserError(f"the grammar cannot be followed: {messages[0].strip().splitlines()[0]}")
        return llguidance().LLMatcher(self.vocabulary, grammar, log_level=0)


class Matcher:
    """Where an answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: Any, thoughts: Thoughts | None, forces: bool = True):
        self._matcher, self._vocabulary = matcher, vocabulary
        self._forces = forces
        self._thoughts, self._may_think = thoughts, thoughts is not None
        self._thinks = thoughts is not None and thoughts.begun
        self._ends = frozenset(vocabulary.eos_tokens)
        self._consumed = 0  # how many tokens the grammar has taken
        self._words = -(-vocabulary.vocab_size // 32)

    def take(self, tokens: Sequence[int]) -> None:
        """These tokens are part of the answer, which goes on; each was allowed.

        Raises:
          RuntimeError: one was not, or the grammar became too large to follow.
        """
        for token in tokens:
            if self._thoughts is not None and (self._thinks or (self._may_think and token == self._thoughts.begin)):
                self._thinks, self._may_think = token != self._thoughts.end, False
                continue
            self._may_think = False
            self._consumed += 1
            if not self._matcher.consume_token(token):
                raise self._error()

    def check(self, proposed: Sequence[int], most: int) -> CheckedDrafts:
        """The drafts to verify next, and which tokens are allowed between them.

        Args:
          proposed: what a drafter proposes; -1 is no draft.
          most: the most drafts.

        Raises:
          RuntimeError: the grammar became too large to follow.
        """
        bits = np.zeros((most + 1, self._words), np.uint32)
        drafts: list[int] = []
        before = self._thinks, self._may_think, self._consumed
        self._fill(bits[0])
        while len(drafts) < most:
            slot = len(drafts)
            token = self._draft(bits[slot], proposed[slot] if slot < len(proposed) else -1)
            if token is None:
                break
            drafts.append(token)
            if token in self._ends:
                break
            self.take([token])
            self._fill(bits[slot + 1])
        consumed = self._consumed
        self._thinks, self._may_think, self._consumed = before
        self._matcher.rollback(consumed - self._consumed)
        return CheckedDrafts(drafts, bits[: len(drafts) + 1])

    def _fill(self, bits: UInt32[np.ndarray, " words"]) -> None:
        if self._thinks:
            bits[:] = 2**32 - 1
            return
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            raise self._error()
        if self._may_think and self._thoughts is not None:
            bits[self._thoughts.begin // 32] |= np.uint32(1 << self._thoughts.begin % 32)

    def _error(self) -> RuntimeError:
        reason = self._matcher.get_error().splitlines()[0]
        return RuntimeError(f"the grammar cannot be followed any further: {reason}")

    def _draft(self, bits: UInt32[np.ndarray, " words"], proposed: int) -> int | None:
        """What is proposed, where it is allowed; else what the grammar forces, if it does."""
        if self._thinks or not self._forces:
            return proposed if proposed >= 0 and _has(bits, proposed) else None
        if np.bitwise_count(bits).sum() == 1:
            [word] = np.flatnonzero(bits)
            return int(word) * 32 + int(bits[word]).bit_length() - 1
        forced = self._vocabulary.tokenize_bytes(self._matcher.compute_ff_bytes())
        return next((token for token in (proposed, *forced[:1]) if token >= 0 and _has(bits, token)), None)


def _has(bits: UInt32[np.ndarray, " words"], token: int) -> bool:
    return bool(bits[token // 32] >> (token % 32) & 1)
