"""Log-probabilities of what was chosen or given, and of the likeliest tokens beside it, for the rows that ask.

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

MAX_TOP = 20  # likeliest tokens kept for each token
_TILE = 64  # places of prompts whose logits are held at a time


class Logprobs(NamedTuple):
    """Log-probabilities under the target's raw logits, of a batch in flight.

    Attributes:
      asked: whether the row wants them.
      prompt_asked: whether it wants those of its prompt's tokens, too, from the second on.
      chosen: what the row's own tokens had, by position.
      top_ids: the n likeliest tokens at each place, best first.
      top_logprobs: what these had.
    """

    asked: Bool[Array, " B"]
    prompt_asked: Bool[Array, " B"]
    chosen: Float32[Array, "B C"]
    top_ids: Int32[Array, "B C n"]
    top_logprobs: Float32[Array, "B C n"]


def init_logprobs(rows: int, positions: int, vocab_size: int) -> Logprobs:
    """Nothing asked for yet; n is `MAX_TOP`, or the whole vocabulary if that is smaller."""
    top = min(MAX_TOP, vocab_size)
    return Logprobs(
        asked=jnp.zeros(rows, bool),
        prompt_asked=jnp.zeros(rows, bool),
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
        width = tokens.shape[1]
        places = hidden[flat.asking(width).reshape(-1)]
        there = asked[:, None] & (jnp.arange(width) <= flat.drafts[:, None])
        columns = known[jnp.minimum(flat.seats, rows - 1)][:, None] + jnp.arange(width)
        columns = jnp.where(there, columns, positions)
        found = _scores(places, tokens.reshape(-1), lm_head, old.top_ids.shape[2])
        return _written(old, jnp.repeat(flat.seats, width), columns.reshape(-1), found)

    return jax.lax.cond(jnp.any(asked), write, lambda old: old, logprobs)


def record_prompt_logprobs(
    logprobs: Logprobs | None,
    hidden: Float[Array, "T D"],
    flat: Flat,
    tokens: Int32[Array, "B C"],
    prompt: Int32[Array, " B"],
    lm_head: Float[Array, "V D"],
) -> Logprobs | None:
    """Writes the log-probabilities of the prompts' tokens that follow the places of a pass.

    Args:
      logprobs, hidden, flat, lm_head: as `record_logprobs` has them.
      tokens: the tokens of each row.
      prompt: how many of them are its prompt's.
    """
    if logprobs is None:
        return None
    T, tile, (positions, n) = len(hidden), min(len(hidden), _TILE), logprobs.top_ids.shape[1:]
    row, column = flat.seats[flat.places.row], flat.places.position + 1
    asked = logprobs.prompt_asked.at[row].get(mode="fill", fill_value=False) & (column > 0)
    asked &= column < prompt.at[row].get(mode="fill", fill_value=0)

    def tiles(x: Array) -> Array:
        return jnp.pad(x, [(0, -T % tile)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, tile, *x.shape[1:])

    def write(old: Logprobs) -> Logprobs:
        of_tiles = jax.lax.map(
            lambda x: _scores(x[0], x[1], lm_head, n), (tiles(hidden), tiles(flat.following(tokens)))
        )
        found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:T], of_tiles)
        return _written(old, row, jnp.where(asked, column, positions), found)

    return jax.lax.cond(jnp.any(asked), write, lambda old: old, logprobs)


class _Scores(NamedTuple):
    """The log-probabilities of a token at each place, and of the n likeliest there."""

    chosen: Float32[Array, " R"]
    top_ids: Int32[Array, "R n"]
    top_logprobs: Float32[Array, "R n"]


def _scores(hidden: Float[Array, "R D"], tokens: Int32[Array, " R"], lm_head: Float[Array, "V D"], n: int) -> _Scores:
    everything = jax.nn.log_softmax(lm_head_logits(hidden, lm_head).astype(jnp.float32))
    chosen = jnp.take_along_axis(everything, tokens[:, None], axis=1)[:, 0]
    top_logprobs, top_ids = jax.lax.top_k(everything, n)
    return _Scores(chosen, top_ids.astype(jnp.int32), top_logprobs)


def _written(old: Logprobs, row: Int32[Array, " R"], column: Int32[Array, " R"], found: _Scores) -> Logprobs:
    """With the scores in their rows and columns; what is outside goes nowhere."""
    put = lambda before, new: before.at[row, column].set(new, mode="drop")
    return old._replace(**{name: put(getattr(old, name), new) for name, new in found._asdict().items()})
