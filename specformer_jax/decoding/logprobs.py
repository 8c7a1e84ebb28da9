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
from specformer_jax.decoding.flat import Flat

MAX_TOP = 20  # likeliest tokens kept for each token of an answer


class Logprobs(NamedTuple):
    """Log-probabilities under the target's raw logits, of a batch in flight.

    Attributes:
      asked: whether the row wants them.
      chosen: what the row's own tokens had, by position.
      top_ids: the n likeliest tokens at each place, best first.
      top_logprobs: what these had.
    """

    asked: Bool[Array, " B"]
    chosen: Float32[Array, "B C"]
    top_ids: Int32[Array, "B C n"]
    top_logprobs: Float32[Array, "B C n"]


def init_logprobs(rows: int, positions: int, vocab_size: int) -> Logprobs:
    """Nothing asked for yet; n is `MAX_TOP`, or the whole vocabulary if that is smaller."""
    top = min(MAX_TOP, vocab_size)
    return Logprobs(
        asked=jnp.zeros(rows, bool),
        chosen=jnp.zeros((rows, positions), jnp.float32),
        top_ids=jnp.zeros((rows, positions, top), jnp.int32),
        top_logprobs=jnp.zeros((rows, positions, top), jnp.float32),
    )


def record_logprobs(
    logprobs: Logprobs | None,
    hidden: Float[Array, "T D"],
    flat: Flat,
    tokens: Int32[Array, "S W"],
    known: Int32[Array, " B"],
    lm_head: Float[Array, "V D"],
) -> Logprobs | None:
    """Writes the log-probabilities of a pass's tokens; those of tokens that are not committed are overwritten later.

    Args:
      logprobs: as before, or None, which stays None.
      hidden: the target's last hidden states over the flat batch, after the final norm.
      flat: the batch.
      tokens: the target's token after each place of a seat that asks.
      known: the position of the first one, row by row.
      lm_head: the target's LM head.
    """
    if logprobs is None:
        return None
    rows, positions = logprobs.chosen.shape
    asked = flat.asks & flat.seated(logprobs.asked)

    def write(old: Logprobs) -> Logprobs:
        seats, width = tokens.shape
        logits = lm_head_logits(hidden[flat.asking(width).reshape(-1)], lm_head)
        everything = jax.nn.log_softmax(logits.astype(jnp.float32))
        chosen = jnp.take_along_axis(everything, tokens.reshape(-1, 1), axis=1)
        top_logprobs, top_ids = jax.lax.top_k(everything, old.top_ids.shape[2])
        there = asked[:, None] & (jnp.arange(width) <= flat.drafts[:, None])
        columns = known[jnp.minimum(flat.seats, rows - 1)][:, None] + jnp.arange(width)
        columns = jnp.where(there, columns, positions)

        def put(old: Array, new: Array) -> Array:
            return old.at[flat.seats[:, None], columns].set(new.reshape(seats, width, *old.shape[2:]), mode="drop")

        return old._replace(
            chosen=put(old.chosen, chosen),
            top_ids=put(old.top_ids, top_ids.astype(jnp.int32)),
            top_logprobs=put(old.top_logprobs, top_logprobs),
        )

    return jax.lax.cond(jnp.any(asked), write, lambda old: old, logprobs)
