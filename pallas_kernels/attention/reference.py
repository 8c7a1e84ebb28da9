"""Mixed-mask attention: the specification in jnp, and what a CPU runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.places import Pages
from pallas_kernels.attention.tiles import Context, Draft
from pallas_kernels.masks import may_attend
from pallas_kernels.product.api import exact


def attend(
    q: Float[Array, "B T *J N H"],
    context: Context | Pages | None,
    draft: Draft | None,
    start: Int[Array, " B"],
    segments: Int[Array, "B T"] | None,
    table: Int[Array, "B tables"] | None,
    *,
    bidirectional: bool,
) -> Float[Array, "B T *J N H"]:
    """Arguments as `api.mixed_mask_attention`.

    Without segments and pages it expects dead positions of the context to be finite: a pass over the whole cache to
    clear them would double its cost. The kernels clear them tile by tile and do not.
    """
    if table is not None:
        context = _positions_of_rows(context, table, jnp.where(start < 0, 0, start + q.shape[1]))
    in_block = draft is not None
    if not in_block:
        q = q[:, :, None]  # a plain query is a block of one slot
    B, T, J, N, H = q.shape
    K = (draft or context)[0].shape[-2 if in_block else 1]
    group, scale = N // K, H**-0.5
    position = start[:, None] + jnp.arange(T)
    position = jnp.where(start[:, None] < 0, -1, position)
    alive = position >= 0 if segments is None else (position >= 0) & (segments != 0)
    # To [B, K, T, J, group, H]: a key/value head meets its whole group of query heads in one product.
    q = q.reshape(B, T, J, K, group, H).transpose(0, 3, 1, 2, 4, 5)
    q = jnp.where(alive[:, None, :, None, None, None], q, 0)
    scores, values = [], []

    if context is not None:
        k, v = context
        C = v.shape[2]
        cached = jnp.arange(C)
        if segments is None:
            allowed = may_attend(position[:, :, None], cached)
        else:
            k, v = (jnp.where(alive[:, None, :, None], x, 0) for x in context)
            allowed = may_attend(
                position[:, :, None], cached, q_segment=segments[:, :, None], k_segment=segments[:, None, :]
            )
        # The cache may be wider than q and decides the product's dtype.
        rows = q.reshape(B, K, T * J * group, H).astype(k.dtype)
        s = jnp.einsum("bkrh,bkch->bkrc", rows, k, precision=exact(k.dtype), preferred_element_type=jnp.float32)
        s = s.reshape(B, K, T, J, group, C) * scale
        scores.append(jnp.where(allowed[:, None, :, None, None, :], s, -jnp.inf))
        values.append(v)

    if draft is not None:
        k, v = (jnp.where(alive[:, :, None, None, None], x, 0) for x in draft)
        slot = jnp.arange(J)
        allowed = may_attend(
            position[:, :, None, None],
            position[:, :, None, None],
            q_slot=slot[:, None],
            k_slot=slot[None, :],
            bidirectional=bidirectional,
        )
        allowed = allowed & alive[:, :, None, None]
        s = jnp.einsum("bktjgh,btikh->bktjgi", q, k, precision=exact(k.dtype), preferred_element_type=jnp.float32)
        s = s * scale
        scores.append(jnp.where(allowed[:, None, :, :, None, :], s, -jnp.inf))
        values.append(v)

    top = jnp.max(jnp.stack([s.max(-1) for s in scores]), axis=0)[..., None]
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))  # rows that attend nothing
    weights = [jnp.exp(s - top) for s in scores]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    out = 0.0
    if context is not None:
        w = weights.pop(0).astype(context[1].dtype).reshape(B, K, T * J * group, -1)
        out = jnp.einsum(
            "bkrc,bkch->bkrh", w, values.pop(0), precision=exact(w.dtype), preferred_element_type=jnp.float32
        )
        out = out.reshape(B, K, T, J, group, H)
    if draft is not None:
        w = weights.pop(0).astype(values[0].dtype)
        out = out + jnp.einsum(
            "bktjgi,btikh->bktjgh", w, values.pop(0), precision=exact(w.dtype), preferred_element_type=jnp.float32
        )
    out = (out / jnp.where(total == 0.0, 1.0, total)).astype(q.dtype)
    out = out.transpose(0, 2, 3, 1, 4, 5).reshape(B, T, J, N, H)
    return out if in_block else out[:, :, 0]


def _positions_of_rows(pages: Pages, table: Int[Array, "B tables"], end: Int[Array, " B"]) -> Context:
    """The positions of each row side by side; what lies from `end` on, which may be NaN, is zero."""
    B, tables = table.shape
    _, K, p, H = pages[0].shape
    alive = jnp.arange(tables * p) < end[:, None]

    def gather(x):
        x = x.at[table].get(mode="clip").swapaxes(1, 2).reshape(B, K, tables * p, H)
        return jnp.where(alive[:, None, :, None], x, 0)

    return gather(pages[0]), gather(pages[1])
