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

from specformer_jax.drafters.base import Chain, Drafter

LONGEST = 5  # tokens compared: a longer match is preferred, beyond that the later one
REPEATED = 3  # of them, beside a head: fewer are too often a coincidence


class NGram(Drafter):
    """It remembers nothing itself: the rows' tokens are there to search, prompt and answer alike."""

    def memory(self, pages):
        return None

    def context(self, hooks, next_embedding, memory=None, places=None, segments=None):
        return jnp.zeros((*hooks.shape[:-2], 0)), None

    def draft(self, context, memory, start, token, history, count, embed, pick, likeliest, table=None, drawn=False):
        return self.certain(follow(history, start, token, count, shortest=1), drawn)


class WithLookup(Drafter):
    """A drafter whose chain gives way to prompt lookup where the newest `REPEATED` tokens have stood in the row before.

    Its parameters and its memory are the drafter's own.

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

    @property
    def norms_slots(self):
        return self.drafter.norms_slots

    def memory(self, pages):
        return self.drafter.memory(pages)

    def view(self, memory, target_kv):
        return self.drafter.view(memory, target_kv)

    def context(self, hooks, next_embedding, memory=None, places=None, segments=None):
        return self.drafter.context(hooks, next_embedding, memory, places, segments)

    def draft(self, context, memory, start, token, history, count, embed, pick, likeliest, table=None, drawn=False):
        found = self.certain(follow(history, start, token, count, shortest=REPEATED), drawn)
        missing = found.tokens < 0

        def chain(drafter: Drafter) -> Chain:
            own = drafter.draft(context, memory, start, token, history, count, embed, pick, likeliest, table, drawn)
            either = lambda x, y: jnp.where(missing if x.ndim == 3 else missing[..., None], x, y)
            return jax.tree.map(either, own, found)

        if token.size > 1:  # among many anchors one or another nearly always needs the drafter
            return chain(self.drafter)
        return nn.cond(found.tokens[0, 0, 0] < 0, chain, lambda drafter: found, self.drafter)


def follow(
    history: Int32[Array, "B C"], start: Int32[Array, " B"], token: Int32[Array, "B A"], count: int, *, shortest: int
) -> Chain:
    """`lookup` at some anchors of each row.

    Args:
      history: the rows' tokens by position.
      start: the absolute position of anchor 0; negative marks an empty row.
      token: the token after each anchor.
      count, shortest: as in `lookup`.
    """
    anchors = start[:, None] + jnp.arange(token.shape[1])
    find = functools.partial(lookup, count=count, shortest=shortest)
    tokens, run = jax.vmap(jax.vmap(find, (None, 0, 0)))(history, anchors + 1, token)
    sure = run.astype(jnp.float32) / (run + 1)  # the longer what is repeated, the surer
    return Chain(tokens, jnp.where(tokens < 0, 0.0, sure[..., None]))


def lookup(
    history: Int32[Array, " C"],
    end: Int32[Array, ""] | int,
    token: Int32[Array, ""] | int,
    count: int,
    shortest: int = 1,
) -> tuple[Int32[Array, " {count}"], Int32[Array, ""]]:
    """The tokens that followed the latest occurrence of the longest run of tokens that ends at `end`.

    Where the run overlaps itself, what it would repeat goes on.

    Args:
      history: tokens by position; only those before `end` count.
      end: the position of `token`; 0 or less: an empty row.
      token: the newest token.
      count: static, how many to draft.
      shortest: static, how many of the newest tokens must have stood there, at most `LONGEST`.

    Returns:
      The drafts, -1 where they have not, and how many tokens the run has, at most `LONGEST`.

    >>> [x.tolist() for x in lookup(jnp.array([5, 6, 7, 8, 9, 6, 7, 0, 0]), 7, 8, 3)]  # 6 7 8 stood at 1 .. 3
    [[9, 6, 7], 3]
    >>> [x.tolist() for x in lookup(jnp.array([4, 1, 2, 1, 0]), 4, 2, 4)]  # 1 2 1 2: and so on
    [[1, 2, 1, 2], 2]
    >>> [x.tolist() for x in lookup(jnp.array([4, 1, 2, 1, 0]), 4, 2, 4, shortest=3)]  # 2 1 2 is new
    [[-1, -1, -1, -1], 2]
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
    return jnp.where(run[found] >= shortest, followed, -1), run[found].astype(jnp.int32)
