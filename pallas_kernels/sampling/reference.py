"""Sampling with position-keyed noise: the specification in jnp, and what runs where no kernel does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.noise import row_keys
from pallas_kernels.product.api import matmul_rows
from pallas_kernels.sampling.tiles import Best, SampledRows, perturb, tile_softmax


def lm_head_logits(hidden: Float[Array, "R D"], lm_head: Float[Array, "V D"]) -> Float32[Array, "R V"]:
    """The logits of every row over the whole vocabulary, accumulated in float32."""
    return matmul_rows(hidden, lm_head)


def best(
    logits: Float[Array, "R V"],
    rows: SampledRows,
    token_ids: Int[Array, " V"] | None,
    offset: Int[Array, ""],
    *,
    confidence: bool,
) -> Best:
    """The winner of each row; the token of column 0 is `offset` where there are no `token_ids`."""
    logits = logits.astype(jnp.float32)
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32) + offset if token_ids is None else token_ids

    def noisy():
        first, second = row_keys(rows.seed, rows.position)
        by_row = (x[:, None] for x in (first, second, rows.temperature.astype(jnp.float32), rows.floor()))
        return _highest(perturb(logits, ids[None, :], *by_row))

    # Noise costs more than the argmax.
    score, column = jax.lax.cond(jnp.any(rows.temperature > 0), noisy, lambda: _highest(logits))
    return Best(score, column, tile_softmax(logits) if confidence else None)


def _highest(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The highest value of each row and its first column."""
    # Two plain reductions: on CPU they take a tenth of the time of XLA's argmax.
    score = jnp.max(z, axis=1)
    column = jnp.arange(z.shape[1], dtype=jnp.int32)
    return score, jnp.min(jnp.where(z == score[:, None], column, z.shape[1] - 1), axis=1)
