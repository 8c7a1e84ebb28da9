"""What every sampling kernel does with one tile of logits: plain jnp, the very arithmetic of the reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32, UInt32

from pallas_kernels.noise import bits_to_gumbel, noise_bits, row_keys

_LAST = 2**31 - 1


class SampledRows(NamedTuple):
    """What decides each row's token besides its logits: the arguments of `api.sample_logits`."""

    seed: UInt32[Array, " R"]
    position: Int[Array, " R"]
    temperature: Float[Array, " R"]
    threshold: Float[Array, " R"] | None

    def floor(self) -> Float[Array, " R"]:
        """The threshold, -inf where there is none."""
        return jnp.full(self.temperature.shape, -jnp.inf) if self.threshold is None else self.threshold

    def tile_samples(self, tile_rows: int) -> Int32[Array, " tiles"]:
        """1 for each tile of rows in which some row is sampled, 0 where all are greedy and need no noise."""
        sampled = jnp.pad(self.temperature > 0, (0, -len(self.temperature) % tile_rows))
        return sampled.reshape(-1, tile_rows).any(axis=1).astype(jnp.int32)


class Softmax(NamedTuple):
    """The softmax of each row's raw logits, as far as its largest probability takes: that is 1 / mass.

    Attributes:
      top: the largest logit.
      mass: the sum of exp(logit - top); 0 if all logits are -inf.
    """

    top: Float32[Array, " R"]
    mass: Float32[Array, " R"]


class Best(NamedTuple):
    """The winner of each row among the columns seen so far.

    Attributes:
      score: the largest perturbed logit; -inf if all columns are ruled out.
      column: the lowest column that has it; 0 if all are ruled out.
      softmax: None where the confidence is not asked for.
    """

    score: Float32[Array, " R"]
    column: Int32[Array, " R"]
    softmax: Softmax | None = None


class SamplingOperands(NamedTuple):
    """What a kernel reads, None for what a call does without; inside a kernel the refs of a tile.

    Attributes:
      hidden: the hidden states, None where x holds logits.
      x: the logits, or the LM head's rows.
      rows: each row's noise keys, temperature and threshold, laid out as the chip reads them.
      token_ids: the token of each column of a pruned vocabulary.
    """

    hidden: Any
    x: Any
    rows: Any
    token_ids: Any


def row_operands(rows: SampledRows) -> tuple[UInt32[Array, "R 2"], Float32[Array, "R 2"]]:
    """What a kernel needs of each row: its two noise keys, its temperature and threshold."""
    keys = jnp.stack(row_keys(rows.seed, rows.position), axis=1)
    return keys, jnp.stack([rows.temperature, rows.floor()], axis=1).astype(jnp.float32)


def perturb(x, token, first_key, second_key, temperature, threshold, log1p=jnp.log1p) -> Float32[Array, "rows columns"]:
    """logits / temperature + noise, -inf under the threshold; greedy rows unchanged. What a row has is one column."""
    z = x / jnp.where(temperature > 0, temperature, 1.0)
    z = z + bits_to_gumbel(noise_bits((first_key, second_key), token), log1p)
    z = jnp.where(x >= threshold, z, -jnp.inf)
    return jnp.where(temperature > 0, z, x)


def _across(by_row: Float[Array, " rows"], shape: tuple[int, int]) -> Float[Array, "rows columns"]:
    return jax.lax.broadcast_in_dim(by_row, shape, (0,))  # at once: Mosaic GPU has no arrays of one column


def tile_winner(z: Float[Array, "rows columns"], column: Int[Array, "#rows columns"]) -> tuple[jax.Array, jax.Array]:
    """The largest score of each row of a tile, and its lowest column."""
    score = jnp.max(z, axis=1)
    return score, jnp.min(jnp.where(z == _across(score, z.shape), column, _LAST), axis=1)


def exp_from(x: Float32[Array, "*#shape"], top: Float32[Array, "*#shape"]) -> Float32[Array, "*shape"]:
    """exp(x - top) for x <= top; 0, not NaN, where both are -inf."""
    return jnp.exp(x - jnp.where(top > -jnp.inf, top, 0.0))


def tile_softmax(x: Float32[Array, "rows columns"]) -> Softmax:
    """The softmax of the columns of one tile."""
    top = jnp.max(x, axis=1)
    return Softmax(top, jnp.sum(exp_from(x, _across(top, x.shape)), axis=1))


def best_of_tiles(score: Float32[Array, "tiles R"], column: Int32[Array, "tiles R"], softmax: Softmax | None) -> Best:
    """The winner of each row among the winners of its tiles, and the softmax of all of them."""
    winner = jnp.argmax(score, axis=0)[None]  # the first tile of the highest score: the lowest column
    score, column = (jnp.take_along_axis(x, winner, axis=0)[0] for x in (score, column))
    column = jnp.where(score > -jnp.inf, column, 0)  # 0 for NaN too, as on TPU
    if softmax is None:
        return Best(score, column)
    top = jnp.max(softmax.top, axis=0)
    return Best(score, column, Softmax(top, jnp.sum(softmax.mass * exp_from(softmax.top, top), axis=0)))
