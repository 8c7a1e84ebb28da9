"""LogitSpec (Liu et al., arXiv 2507.01449): lookup by a key that reaches one token further than the text. No training.

The logits that chose the next token say something of the token after it, too: it is often among their likeliest. So
each of these is tried as the second half of a key, behind the next token, and what followed the key earlier in the text
is drafted. The paper verifies a tree of all candidates; here the best one makes a chain.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from specformer_jax.drafters.base import Chain, Drafter
from specformer_jax.drafters.ngram import lookup

CANDIDATES = 16  # the likeliest next-next tokens that are tried
REPEATED = 2  # tokens that must have stood there before, for the text alone to be followed
UNSEEN = 0.1  # how sure a draft is that no repeated key speaks for


class LogitSpec(Drafter):
    """It remembers nothing itself: the rows' tokens are there to search, the target's last state gives the logits."""

    def memory(self, pages):
        return None

    def context(self, hooks, next_embedding, memory=None, places=None, segments=None):
        return hooks[..., -1, :], None

    def draft(self, context, memory, start, token, history, count, embed, pick, likeliest, table=None, drawn=False):
        anchors = start[:, None] + jnp.arange(token.shape[1])
        find = functools.partial(retrieve, count=count)
        tokens, confidence = jax.vmap(jax.vmap(find, (None, 0, 0, 0)))(
            history, anchors + 1, token, likeliest(context, CANDIDATES + 1)
        )
        return self.certain(Chain(tokens, confidence), drawn)


def retrieve(
    history: Int32[Array, " C"],
    end: Int32[Array, ""] | int,
    token: Int32[Array, ""] | int,
    candidates: Int32[Array, " candidates"],
    count: int,
) -> tuple[Int32[Array, " {count}"], Float32[Array, " {count}"]]:
    """What followed the key for which most speaks: the newest tokens, with or without a candidate behind them.

    A candidate counts by the newest tokens that stood before it where it stood last: it is preferred to the text alone
    when those are as many, for the logits speak for it, too. Where fewer than `REPEATED` tokens are repeated and no
    candidate has stood behind the newest one, the likeliest candidate is drafted, and what followed it.

    Args:
      history: tokens by position; only those before `end` count.
      end: the position of `token`; 0 or less: an empty row.
      token: the newest token.
      candidates: likely tokens after it, best first; one that is `token` itself is passed over.
      count: static, how many to draft, at least 1.

    Returns:
      The drafts, -1 where there are none, and how sure they are.

    >>> text = jnp.array([5, 6, 7, 8, 5, 6, 9, 1, 0, 0])  # 5 6 went on with 7, and later with 9
    >>> [retrieve(text, 8, 6, jnp.array([6, best]), 3)[0].tolist() for best in (7, 9)]  # 6 stands at 8, once more
    [[7, 8, 5], [9, 1, 6]]
    >>> retrieve(text, 8, 3, jnp.array([3, 8]), 3)[0].tolist()  # 3 is new; 8 is its likeliest successor
    [8, 5, 6]
    """
    plain, run = lookup(history, end, token, count)
    extended = history.at[end].set(token, mode="drop")
    follow = functools.partial(lookup, extended, end + 1, count=count - 1)
    followed, runs = jax.vmap(follow)(candidates)
    chains = jnp.concatenate([candidates[:, None], followed], axis=1)
    # How many of the newest tokens stood before each candidate; the first of equal ones is the likeliest.
    before = jnp.where(candidates == token, -2, runs - 1)
    best = jnp.argmax(jnp.maximum(before, jnp.where(candidates == token, -2, 0)))
    seen = before[best]
    of_candidate = (seen >= jnp.maximum(run, 1)) | (run < REPEATED)
    tokens = jnp.where(of_candidate, chains[best], plain)
    evidence = jnp.where(of_candidate, seen, run).astype(jnp.float32)
    sure = jnp.where(evidence >= 1, evidence / (evidence + 1), UNSEEN)
    return tokens, jnp.where(tokens < 0, 0.0, sure)
