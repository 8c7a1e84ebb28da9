"""Prompt lookup (Saxena 2023): what followed the last time the same tokens stood there. No parameters, no training."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from specformer_jax.drafter import Drafter

Array = jax.Array

LONGEST = 3  # tokens compared: a longer match is preferred, beyond that the later one


class NGram(Drafter):
    """Its memory is the row's tokens by absolute position, i32[B, S], prompt and answer alike; -1 is unknown."""

    def memory(self, rows, slots):
        return jnp.full((rows, slots), -1, jnp.int32)

    def observe(self, hooks, tokens, next_tokens, start, memory, embed):
        """Writes the window where the cache writes its keys: rejected drafts lie past the anchor and are never read."""
        context = jnp.zeros((*tokens.shape, 0))
        if memory is None:
            return context, tokens
        first = jnp.where(start < 0, memory.shape[1], start)[:, None]
        at = first + jnp.arange(tokens.shape[1])
        return context, memory.at[jnp.arange(len(tokens))[:, None], at].set(tokens, mode="drop")

    def draft(self, context, memory, start, token, count, embed, pick):
        anchors = start[:, None] + jnp.arange(token.shape[1])
        find = functools.partial(lookup, count=count)
        return jax.vmap(jax.vmap(find, (None, 0, 0)))(memory, anchors + 1, token)


def lookup(history: Array, end: Array, token: Array, count: int) -> Array:
    """The tokens that followed the latest occurrence of the longest run of tokens that ends at `end`.

    Where the run overlaps itself, what it would repeat goes on.

    Args:
      history: i32[S], tokens by position; only those before `end` count.
      end: i32[], the position of `token`, the newest; 0 or less: an empty row.
      token: i32[].
      count: static, how many to draft.

    Returns:
      i32[count], -1 where the newest token has not occurred before.

    >>> lookup(jnp.array([5, 6, 7, 8, 9, 6, 7, 0, 0]), 7, 8, 3).tolist()  # 6 7 8 stood at 1 .. 3
    [9, 6, 7]
    >>> lookup(jnp.array([4, 1, 2, 1, 0]), 4, 2, 4).tolist()  # 1 2 1 2: and so on
    [1, 2, 1, 2]
    """
    slots = jnp.arange(history.shape[0])
    history = jnp.where(slots < end, history, jnp.where(slots == end, token, -1))
    run, alive = jnp.zeros_like(slots), slots < end
    for back in range(LONGEST):
        wanted = history[jnp.maximum(end - back, 0)]
        alive &= (slots >= back) & (jnp.roll(history, back) == wanted) & (end >= back)
        run += alive
    found = jnp.argmax(run * history.shape[0] + slots * (run > 0))
    ahead = jnp.arange(count) % jnp.maximum(end - found, 1)
    followed = history[jnp.minimum(found + 1 + ahead, history.shape[0] - 1)]
    return jnp.where(run[found] > 0, followed, -1)
