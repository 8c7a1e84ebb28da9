"""What a CPU runs where the cache is long: attention block by block, up to the last position that any row has in use.

The plain reference reads every position, as its shapes are static; a server's cache is mostly empty.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.masks import may_attend

BLOCK = 128  # positions of a block, small enough for its copies of keys and values to stay in the processor's cache
# Of so many positions or fewer, or where the cache is well over half full, the plain reference is quicker.
LONG = 1024


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K H C"],
    v: Float[Array, "B K C H"],
    *,
    start: Int[Array, " B"],
    block: int = BLOCK,
) -> Float[Array, "B T N H"]:
    """The decode form of `api.mixed_mask_attention` with transposed keys, as a running softmax over blocks.

    A block that holds nothing for a row changes none of its bits, so a row's output does not depend on the others.

    Args:
      q, k, v, start: as there; positions not in use must be finite.
      block: how many positions are read at a time.
    """
    B, T, N, H = q.shape
    K, C = v.shape[1:3]
    group, scale = N // K, H**-0.5
    block = min(block, C)
    position = jnp.where(start[:, None] < 0, -1, start[:, None] + jnp.arange(T))
    # One row for each token and query head of a group, so that a key/value head meets them all in one product.
    of_row = jnp.repeat(position, group, axis=1)[:, None, :, None]
    rows = q.reshape(B, T, K, group, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * group, H).astype(k.dtype)

    def add_block(i, carry):
        top, total, out = carry
        begin = jnp.minimum(i * block, C - block)  # the last block may overlap the one before
        cached = begin + jnp.arange(block)
        keys = jax.lax.dynamic_slice_in_dim(k, begin, block, axis=3)
        values = jax.lax.dynamic_slice_in_dim(v, begin, block, axis=2)
        scores = jnp.einsum("bkrh,bkhc->bkrc", rows, keys, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(may_attend(of_row, cached) & (cached >= i * block), scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, kept = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        part = jnp.einsum("bkrc,bkch->bkrh", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
        return new_top, total * kept + weights.sum(-1, keepdims=True), out * kept + part

    lowest = jnp.full((B, K, T * group, 1), jnp.finfo(jnp.float32).min)  # finite: rows that attend nothing stay there
    begin = lowest, jnp.zeros_like(lowest), jnp.zeros(rows.shape, jnp.float32)
    _, total, out = jax.lax.fori_loop(0, (position.max() + block) // block, add_block, begin)
    out = (out / jnp.where(total == 0.0, 1.0, total)).astype(q.dtype)
    return out.reshape(B, K, T, group, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
