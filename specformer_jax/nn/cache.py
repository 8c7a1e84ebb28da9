"""The paged KV cache: pages of a few positions each, for every layer of the target and for the drafter's.

A row's pages are named by one table that all layers share. The layers are separate arrays, not one stacked array, so
that each is updated in place by itself and decoding can unroll over them; what the drafter keeps of the context comes
last (`Drafter.memory`). Tokens are written before they are verified. Committing means advancing the row's length: what
was rejected lies beyond it and is overwritten by what is read next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels import dispatch
from specformer_jax.config import TargetConfig

# Positions of a page. Small pages waste least; an accelerator reads one at a time, and larger ones faster.
PAGE = {"cpu": 16, "tpu": 256, "cuda": 64}


class LayerKV(NamedTuple):
    """Keys and values of one layer.

    Trees of other things than arrays take this structure too (shapes, shardings), so no type is checked here.

    Attributes:
      k: f[P, K, p, H] in pages; f[B, K, T, H] of whole sequences, which have no cache.
      v: likewise.
    """

    k: Any
    v: Any


KVCache = tuple[LayerKV, ...]


def page_size() -> int:
    """How many positions a page holds on the platform that is lowered for."""
    return PAGE[dispatch.platform()]


def pages_for(positions: int) -> int:
    """How many pages hold so many positions."""
    return -(-positions // page_size())


def create(config: TargetConfig, layers: int, pages: int, dtype: jax.typing.DTypeLike) -> KVCache:
    """An empty cache of `layers` layers: L for the target, as many as it needs for a drafter.

    Where a CPU has no native attention it stores float32 whatever the compute dtype (bfloat16 values stay bfloat16
    values): XLA's CPU backend has no bfloat16 scatter and would convert the whole cache to float32 and back at every
    write.
    """
    if dispatch.platform() == "cpu" and dispatch.native_unavailable() is not None:
        dtype = jnp.float32
    shape = (pages, config.kv_heads, page_size(), config.head_size)
    return tuple(LayerKV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers))


def identity_table(rows: int, pages: int) -> Int32[Array, "B tables"]:
    """The table of rows that have their pages one after the other, for a batch whose cache is theirs alone."""
    return jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)
