"""Attention that looks back over a window, in whole pages: it reads fewer of those that the cache holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention.places import nearest_pages
from pallas_kernels.attention.tiles import Draft
from specformer_jax.nn.cache import LayerKV, page_size
from specformer_jax.nn.sharded_kernels import mixed_mask_attention


def windowed_attention(
    q: Float[Array, "B T *J N H"],
    context: LayerKV,
    draft: Draft | None = None,
    *,
    start: Int32[Array, " B"],
    window: int | None,
    segments: Int32[Array, "B T"] | None = None,
    table: Int32[Array, "B tables"] | None = None,
    bidirectional: bool = True,
) -> Float[Array, "B T *J N H"]:
    """`pallas_kernels.mixed_mask_attention` to the last `window` positions of the context, and to its draft block.

    Args:
      q, context, draft, start, segments, table, bidirectional: as there; whole sequences start at 0.
      window: how many positions of the context each anchor attends to at least, itself counted, and what precedes them
        on their page. With a table those of a row's first anchor count for all its anchors, in whole sequences those of
        the first anchor on a page. None: all. Packed documents are no longer than the window.
    """
    if window is not None and table is not None:
        p = context.k.shape[2]
        table, skipped = nearest_pages(table, start, window, q.shape[1], p)
        start = start - skipped * p
    elif window is not None and window < q.shape[1]:
        assert segments is None, "packed documents are no longer than the window"
        return _page_by_page(q, context, draft, window, bidirectional)
    return mixed_mask_attention(
        q, context, draft, start=start, segments=segments, table=table, bidirectional=bidirectional
    )


def _page_by_page(q: Array, context: LayerKV, draft: Draft | None, window: int, bidirectional: bool) -> Array:
    """Whole sequences: the anchors of a page become a row of their own, beside the keys and values that they read."""
    B, T = q.shape[:2]
    p = page_size()
    behind = -(-(window - 1) // p) * p  # so many positions before its own page are read by a page's anchors
    first = jnp.arange(0, T, p)
    begin = jnp.maximum(first - behind, 0)

    def cut(x: Array) -> Array:
        pieces = jnp.take(x, begin[:, None] + jnp.arange(behind + p), axis=2, mode="clip")  # [B, K, pieces, ., H]
        return jnp.moveaxis(pieces, 2, 1).reshape(-1, x.shape[1], behind + p, x.shape[3])

    def pages(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, len(first) * p - T), *[(0, 0)] * (x.ndim - 2)))
        return padded.reshape(-1, p, *x.shape[2:])

    out = mixed_mask_attention(
        pages(q),
        LayerKV(cut(context.k), cut(context.v)),
        jax.tree.map(pages, draft),
        start=jnp.tile(first - begin, B),
        bidirectional=bidirectional,
    )
    return out.reshape(B, -1, *q.shape[2:])[:, :T]
