"""What every sampling kernel does with one tile of logits: plain jnp, the very arithmetic of the reference."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.noise import bits_to_gumbel, noise_bits, row_keys

LAST = 2**31 - 1


class Best(NamedTuple):
    """The winner of a row among the columns seen so far, and the softmax of those columns.

    Attributes:
      score: f32[R], the largest perturbed logit; -inf if all are ruled out.
      column: i32[R], its lowest column; 0 if all are ruled out.
      raw: f32[R], the raw logit there; None without log-probabilities.
      lse: f32[R], log-sum-exp of the raw logits; None likewise.
    """

    score: jax.Array
    column: jax.Array
    raw: jax.Array | None
    lse: jax.Array | None


def row_operands(seed, position, temperature, threshold) -> tuple[jax.Array, jax.Array]:
    """What a kernel needs of each row: u32[R, 2] noise keys, f32[R, 2] temperature and threshold."""
    keys = jnp.stack(row_keys(seed, position), axis=1)
    threshold = jnp.full(temperature.shape, -jnp.inf) if threshold is None else threshold
    return keys, jnp.stack([temperature, threshold], axis=1).astype(jnp.float32)


def perturb(x, token, first_key, second_key, temperature, threshold) -> jax.Array:
    """logits / temperature + noise, -inf under the threshold; greedy rows unchanged. f32[r, v]; rows are [r, 1]."""
    z = x / jnp.where(temperature > 0, temperature, 1.0)
    z = z + bits_to_gumbel(noise_bits((first_key, second_key), token))
    z = jnp.where(x >= threshold, z, -jnp.inf)
    return jnp.where(temperature > 0, z, x)


def tile_winner(z: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32[r, v], i32[1, v] -> largest score f32[r] and its lowest column i32[r]."""
    score = jnp.max(z, axis=1)
    return score, jnp.min(jnp.where(z == score[:, None], column, LAST), axis=1)
