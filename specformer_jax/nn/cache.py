"""The KV cache: one head-major pair of arrays a layer, written a window at a time.

The layers are separate arrays, not one stacked array, so that each is updated in place by itself and decoding can
unroll over them; the drafter's context attention is simply the last layer. A window is written before it is verified.
Committing means advancing the row's length: what was rejected lies beyond it and is overwritten by the next window.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from specformer_jax.config import TargetConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKV:
    """Keys and values of one layer.

    Attributes:
      k: f[B, K, C, H], or f[B, K, H, C] with `transposed_keys`.
      v: f[B, K, C, H].
      transposed_keys: static, part of the tree's structure.
    """

    # Trees of other things than arrays take this structure too (shapes, shardings), so no type is checked here.
    k: Any
    v: Any
    transposed_keys: bool = dataclasses.field(default=False, metadata={"static": True})


KVCache = tuple[LayerKV, ...]


def create(config: TargetConfig, layers: int, rows: int, positions: int, dtype: jax.typing.DTypeLike) -> KVCache:
    """An empty cache of `layers` layers (L, and one more for the drafter).

    On CPU it stores float32 whatever the compute dtype (bfloat16 values stay bfloat16 values): XLA's CPU backend has
    no bfloat16 scatter and would convert the whole cache to float32 and back at every write. And it stores the keys
    transposed: the product of a few queries with keys that lie position by position takes two to four times as long
    there.
    """
    on_cpu = dispatch.platform() == "cpu"
    dtype = jnp.float32 if on_cpu else dtype
    values = (rows, config.kv_heads, positions, config.head_size)
    keys = (rows, config.kv_heads, config.head_size, positions) if on_cpu else values
    return tuple(LayerKV(jnp.zeros(keys, dtype), jnp.zeros(values, dtype), on_cpu) for _ in range(layers))


def write_window(
    kv: LayerKV, k: Float[Array, "B K T H"], v: Float[Array, "B K T H"], start: Int32[Array, " B"]
) -> LayerKV:
    """Writes a window's keys and values into positions start[b] .. start[b] + T - 1 of each row.

    Positions past the last are dropped, so a window that reaches over the end never moves onto committed ones; of an
    empty row (negative start) all are. NaN is written as 0: a masked position has weight 0, and 0 * NaN would reach the
    row's next request.
    """
    rows = jnp.arange(k.shape[0])[:, None, None]
    heads = jnp.arange(k.shape[1])[:, None]
    first = jnp.where(start < 0, kv.v.shape[2], start)[:, None, None]
    positions = first + jnp.arange(k.shape[2])  # [B, 1, T]

    # Three indices and no slice: XLA's CPU backend turns a lone index into an update that copies the cache.
    at_positions = (rows, heads, positions)
    at_keys = (rows, heads, slice(None), positions) if kv.transposed_keys else at_positions

    def put(old: Array, at: tuple, new: Array) -> Array:
        return old.at[at].set(jnp.nan_to_num(new.astype(old.dtype)), mode="drop", unique_indices=True)

    return dataclasses.replace(kv, k=put(kv.k, at_keys, k), v=put(kv.v, at_positions, v))
