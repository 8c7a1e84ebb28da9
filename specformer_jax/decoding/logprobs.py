"""Log-probabilities of what was chosen, and of the likeliest tokens beside it, for the rows that ask.

They are computed from the same hidden states beside the choice, never instead of it: asking changes no token. A batch
in which no row asks skips the work at run time, so one compiled program serves both.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels import lm_head_logits

MAX_TOP = 20  # likeliest tokens kept for each token of an answer


class Logprobs(NamedTuple):
    """Log-probabilities under the target's raw logits, of a batch in flight.

    Attributes:
      asked: whether the row wants them.
      chosen: what the answer's own tokens had.
      top_ids: the n likeliest tokens at each place, best first.
      top_logprobs: what these had.
    """

    asked: Bool[Array, " B"]
    chosen: Float32[Array, "B M"]
    top_ids: Int32[Array, "B M n"]
    top_logprobs: Float32[Array, "B M n"]


def init_logprobs(rows: int, max_new_tokens: int, vocab_size: int) -> Logprobs:
    """Nothing asked for yet; n is `MAX_TOP`, or the whole vocabulary if that is smaller."""
    top = min(MAX_TOP, vocab_size)
    return Logprobs(
        asked=jnp.zeros(rows, bool),
        chosen=jnp.zeros((rows, max_new_tokens), jnp.float32),
        top_ids=jnp.zeros((rows, max_new_tokens, top), jnp.int32),
        top_logprobs=jnp.zeros((rows, max_new_tokens, top), jnp.float32),
    )


def record_logprobs(
    logprobs: Logprobs | None,
    hidden: Float[Array, "B W D"],
    tokens: Int32[Array, "B W"],
    emitted: Int32[Array, " B"],
    lm_head: Float[Array, "V D"],
    active: Bool[Array, " B"],
) -> Logprobs | None:
    """Writes the log-probabilities of a window's tokens; those of tokens that are not committed are overwritten later.

    Args:
      logprobs: as before, or None, which stays None.
      hidden: the target's last hidden states, after the final norm.
      tokens: the target's token after each window index.
      emitted: the column of the first one.
      lm_head: the target's LM head.
      active: whether the window belongs to the row.
    """
    if logprobs is None:
        return None
    rows, window, width = hidden.shape
    asked = logprobs.asked & active

    def write(old: Logprobs) -> Logprobs:
        everything = jax.nn.log_softmax(lm_head_logits(hidden.reshape(-1, width), lm_head).astype(jnp.float32))
        chosen = jnp.take_along_axis(everything, tokens.reshape(-1, 1), axis=1)
        top_logprobs, top_ids = jax.lax.top_k(everything, old.top_ids.shape[2])
        columns = jnp.where(asked[:, None], emitted[:, None] + jnp.arange(window), old.chosen.shape[1])

        def put(old: Array, new: Array) -> Array:
            return old.at[jnp.arange(rows)[:, None], columns].set(
                new.reshape(rows, window, *old.shape[2:]), mode="drop"
            )

        return old._replace(
            chosen=put(old.chosen, chosen),
            top_ids=put(old.top_ids, top_ids.astype(jnp.int32)),
            top_logprobs=put(old.top_logprobs, top_logprobs),
        )

    return jax.lax.cond(jnp.any(asked), write, lambda old: old, logprobs)
