"""Prompt lookup (Saxena 2023): what followed the last time the same tokens stood there. No parameters, no training.

By itself it is the drafter `NGram`. Beside a head (`WithLookup`) it drafts where a run of tokens is repeated: what
follows is often a copy, which a forecast from hidden states seldom gets right for several tokens.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from specformer_jax.drafters.base import Drafter

LONGEST = 5  # tokens compared: a longer match is preferred, beyond that the later one
REPEATED = 3  # of them, beside a head: fewer are too often a coincidence


class NGram(Drafter):
    """Its memory is the row's tokens by absolute position, prompt and answer alike; -1 is unknown."""

    def memory(self, rows, positions):
        return empty_history(rows, positions)

    def observe(self, hooks, tokens, next_tokens, start, memory, embed):
        return jnp.zeros((*tokens.shape, 0)), remember(memory, tokens, start)

    def draft(self, context, memory, start, token, count, embed, pick):
        return follow(memory, start, token, count, shortest=1)


class WithLookup(Drafter):
    """A drafter whose chain gives way to prompt lookup where the newest `REPEATED` tokens have stood in the row before.

    Its parameters are the drafter's own; its memory is the pair of the drafter's and of the row's tokens.

    Attributes:
      drafter: whoever drafts where nothing is repeated.
    """

    drafter: Drafter = dataclasses.field(kw_only=True)

    @classmethod
    def around(cls, drafter: Drafter) -> WithLookup:
        """The drafter, with lookup."""
        return cls(drafter.target, drafter.config, drafter.dtype, drafter=drafter)

    def setup(self):
        nn.share_scope(self, self.drafter)

    def memory(self, rows, positions):
        return self.drafter.memory(rows, positions), empty_history(rows, positions)

    def observe(self, hooks, tokens, next_tokens, start, memory, embed):
        own, history = (None, None) if memory is None else memory
        context, own = self.drafter.observe(hooks, tokens, next_tokens, start, own, embed)
        return context, (own, remember(history, tokens, start))

    def draft(self, context, memory, start, token, count, embed, pick):
        own, history = memory
        found = follow(history, start, token, count, shortest=REPEATED)

        def chain(drafter: Drafter) -> Array:
            return jnp.where(found < 0, drafter.draft(context, own, start, token, count, embed, pick), found)

        if token.size > 1:  # among many anchors one or another nearly always needs the drafter
            return chain(self.drafter)
        return nn.cond(found[0, 0, 0] < 0, chain, lambda drafter: found, self.drafter)


def empty_history(rows: int, positions: int) -> Int32[Array, "B C"]:
    """The tokens of rows of which none is known."""
    return jnp.full((rows, positions), -1, jnp.int32)


def remember(
    history: Int32[Array, "B C"] | None, tokens: Int32[Array, "B W"], start: Int32[Array, " B"]
) -> Int32[Array, "B _"]:
    """Writes a window where the cache writes its keys: rejected drafts lie past the anchor and are never read.

    Args:
      history: tokens by absolute position; None where the window is the whole sequence.
      tokens: the window.
      start: the absolute position of tokens[:, 0]; negative marks an empty row.
    """
    if history is None:
        return tokens
    first = jnp.where(start < 0, history.shape[1], start)[:, None]
    at = first + jnp.arange(tokens.shape[1])
    return history.at[jnp.arange(len(tokens))[:, None], at].set(tokens, mode="drop")


def follow(
    history: Int32[Array, "B C"], start: Int32[Array, " B"], token: Int32[Array, "B T"], count: int, *, shortest: int
) -> Int32[Array, "B T {count}"]:
    """`lookup` at some anchors of each row.

    Args:
      history: what `remember` wrote.
      start: the absolute position of anchor 0; negative marks an empty row.
      token: the token after each anchor.
      count, shortest: as in `lookup`.
    """
    anchors = start[:, None] + jnp.arange(token.shape[1])
    find = functools.partial(lookup, count=count, shortest=shortest)
    return jax.vmap(jax.vmap(find, (None, 0, 0)))(history, anchors + 1, token)


def lookup(
    history: Int32[Array, " C"],
    end: Int32[Array, ""] | int,
    token: Int32[Array, ""] | int,
    count: int,
    shortest: int = 1,
) -> Int32[Array, " {count}"]:
    """The tokens that followed the latest occurrence of the longest run of tokens that ends at `end`.

    Where the run overlaps itself, what it would repeat goes on.

    Args:
      history: tokens by position; only those before `end` count.
      end: the position of `token`; 0 or less: an empty row.
      token: the newest token.
      count: static, how many to draft.
      shortest: static, how many of the newest tokens must have stood there, at most `LONGEST`.

    Returns:
      The drafts, -1 where they have not.

    >>> lookup(jnp.array([5, 6, 7, 8, 9, 6, 7, 0, 0]), 7, 8, 3).tolist()  # 6 7 8 stood at 1 .. 3
    [9, 6, 7]
    >>> lookup(jnp.array([4, 1, 2, 1, 0]), 4, 2, 4).tolist()  # 1 2 1 2: and so on
    [1, 2, 1, 2]
    >>> lookup(jnp.array([4, 1, 2, 1, 0]), 4, 2, 4, shortest=3).tolist()  # 2 1 2 is new
    [-1, -1, -1, -1]
    """
    positions = jnp.arange(history.shape[0])
    history = jnp.where(positions < end, history, jnp.where(positions == end, token, -1))
    run, alive = jnp.zeros_like(positions), positions < end
    for back in range(LONGEST):
        wanted = history[jnp.maximum(end - back, 0)]
        alive &= (positions >= back) & (jnp.roll(history, back) == wanted) & (end >= back)
        run += alive
    found = jnp.argmax(run * history.shape[0] + positions * (run > 0))
    ahead = jnp.arange(count) % jnp.maximum(end - found, 1)
    followed = history[jnp.minimum(found + 1 + ahead, history.shape[0] - 1)]
    return jnp.where(run[found] >= shortest, followed, -1)
