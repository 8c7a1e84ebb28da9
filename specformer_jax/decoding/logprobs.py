"""Log-probabilities of what was chosen, and of the likeliest tokens beside it, for the rows that ask.

They are computed from the same hidden states beside the choice, never instead of it: asking changes no token. A batch
in which no row asks skips the work at run time, so one compiled program serves both.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import lm_head_logits

Array = jax.Array

MAX_TOP = 20  # likeliest tokens kept for each token of an answer


class Scores(NamedTuple):
    """Log-probabilities under the target's raw logits, of a batch in flight.

    Attributes:
      asked: bool[B], the rows that want them.
      logprobs: f32[B, M], of the answer's tokens.
      top_ids: i32[B, M, N], the likeliest tokens at each place, best first.
      top_logprobs: f32[B, M, N], theirs.
    """

    asked: Array
    logprobs: Array
    top_ids: Array
    top_logprobs: Array


def init_scores(rows: int, room: int, vocab_size: int) -> Scores:
    """Nothing asked for yet; N is `MAX_TOP`, or the whole vocabulary if that is smaller."""
    top = min(MAX_TOP, vocab_size)
    return Scores(
        asked=jnp.zeros(rows, bool),
        logprobs=jnp.zeros((rows, room), jnp.float32),
        top_ids=jnp.zeros((rows, room, top), jnp.int32),
        top_logprobs=jnp.zeros((rows, room, top), jnp.float32),
    )


def score(
    scores: Scores | None, hidden: Array, tokens: Array, emitted: Array, lm_head: Array, active: Array
) -> Scores | None:
    """Writes the scores of a window's tokens; of those that are not committed they are overwritten later.

    Args:
      scores: as before, or None, which stays None.
      hidden: f[B, W, D], after the final norm.
      tokens: i32[B, W], the target's token after each window index.
      emitted: i32[B], the column of the first one.
      lm_head: f[V, D].
      active: bool[B], the rows that the window belongs to.
    """
    if scores is None:
        return None
    rows, window, width = hidden.shape
    asked = scores.asked & active

    def write(scores: Scores) -> Scores:
        logprobs = jax.nn.log_softmax(lm_head_logits(hidden.reshape(-1, width), lm_head).astype(jnp.float32))
        chosen = jnp.take_along_axis(logprobs, tokens.reshape(-1, 1), axis=1).reshape(rows, window)
        top, top_ids = jax.lax.top_k(logprobs, scores.top_ids.shape[2])
        room = scores.logprobs.shape[1]
        columns = jnp.where(asked[:, None], emitted[:, None] + jnp.arange(window), room)

        def put(old, new):
            return old.at[jnp.arange(rows)[:, None], columns].set(
                new.reshape(rows, window, *old.shape[2:]), mode="drop"
            )

        return scores._replace(
            logprobs=put(scores.logprobs, chosen),
            top_ids=put(scores.top_ids, top_ids.astype(jnp.int32)),
            top_logprobs=put(scores.top_logprobs, top),
        )

    return jax.lax.cond(jnp.any(asked), write, lambda scores: scores, scores)
