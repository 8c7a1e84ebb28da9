"""What a CPU runs where the cache is long: attention block by block, up to the last slot that any row has in use.

The plain reference reads every slot, as its shapes are static; a server's cache is mostly empty.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.masks import may_attend

BLOCK = 128  # slots of a block, small enough for its copies of keys and values to stay in the processor's cache
LONG = 1024  # in a cache of so many slots or fewer, or one that is well over half full, the plain reference is quicker


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, start: jax.Array, scale: float, block: int = BLOCK
) -> jax.Array:
    """The decode form of `api.mixed_mask_attention` with transposed keys, as a running softmax over blocks.

    A block that holds nothing for a row changes none of its bits, so a row's output does not depend on the others.

    Args:
      q: f[B, T, N, H].
      k: f[B, K, H, S]; slots not in use must be finite.
      v: f[B, K, S, H].
      start: i32[B], as there.
      scale: of the scores.
      block: static, slots of a block.

    Returns:
      f[B, T, N, H] of the dtype of q.
    """
    B, T, N, H = q.shape
    K, S = v.shape[1:3]
    G = N // K
    block = min(block, S)
    position = jnp.where(start[:, None] < 0, -1, start[:, None] + jnp.arange(T))
    of_row = jnp.repeat(position, G, axis=1)[:, None, :, None]  # [B, 1, R, 1], r = (T G)
    rows = q.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H).astype(k.dtype)

    def add_block(i, carry):
        top, total, out = carry
        begin = jnp.minimum(i * block, S - block)  # the last block may overlap the one before
        slot = begin + jnp.arange(block)
        keys = jax.lax.dynamic_slice_in_dim(k, begin, block, axis=3)
        values = jax.lax.dynamic_slice_in_dim(v, begin, block, axis=2)
        scores = jnp.einsum("bkrh,bkhs->bkrs", rows, keys, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(may_attend(of_row, slot) & (slot >= i * block), scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, kept = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        part = jnp.einsum("bkrs,bksh->bkrh", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
        return new_top, total * kept + weights.sum(-1, keepdims=True), out * kept + part

    lowest = jnp.full((B, K, T * G, 1), jnp.finfo(jnp.float32).min)  # finite: rows that attend nothing stay there
    begin = lowest, jnp.zeros_like(lowest), jnp.zeros(rows.shape, jnp.float32)
    _, total, out = jax.lax.fori_loop(0, (position.max() + block) // block, add_block, begin)
    out = (out / jnp.where(total == 0.0, 1.0, total)).astype(q.dtype)
    return out.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
