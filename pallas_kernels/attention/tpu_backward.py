"""Mixed-mask attention on TPU, backward: one pass by query tile (dq and the draft's dk, dv), one by context tile.

With p = exp(scale q k^T - logsumexp), delta = sum_h dout * out:
dv = p^T dout,  ds = p * (dout v^T - delta),  dq = scale ds k,  dk = scale ds^T q.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tiles
from pallas_kernels.attention.tiles import AttentionOperands, Incoming, Prefetched, Tiling
from pallas_kernels.attention.tpu_forward import scores, specs
from pallas_kernels.mosaic import cost, dot, params


def _by_query(
    plan: Tiling, known: Prefetched, refs: AttentionOperands, incoming: Incoming, dq_ref, ddraft_refs, acc_ref
):
    """dq of a query tile over its context tiles, and dk, dv of its draft tile."""
    b, i, c = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start, first, last = known.at(b, i)
    position, slot = tiles.query_places(plan, start, i, 0)

    def gradients(k, v, allowed):
        scores = dot(refs.q[...], k, (1, 1)) * plan.scale
        weights = jnp.where(allowed, jnp.exp(scores - incoming.sums[...].T), 0.0)
        return weights, weights * (dot(incoming.dout[...], v, (1, 1)) - incoming.delta[...].T)

    @pl.when(c == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        if plan.draft:
            dk_ref, dv_ref = ddraft_refs
            allowed = tiles.draft_mask(plan, position, slot, start, i)
            weights, ds = gradients(refs.draft_k[...], refs.draft_v[...], allowed)
            ds = ds.astype(refs.draft_k.dtype)
            acc_ref[...] += dot(ds, refs.draft_k[...], (1, 0))
            dk_ref[...] = (dot(ds, refs.q[...], (0, 0)) * plan.scale).astype(dk_ref.dtype)
            dv_ref[...] = dot(weights.astype(refs.draft_v.dtype), incoming.dout[...], (0, 0)).astype(dv_ref.dtype)

    if plan.C:

        @pl.when((first <= c) & (c <= last))
        def _():
            q_segment = refs.q_segment[...].T if plan.segments else None  # one column
            k_segment = refs.k_segment[...] if plan.segments else None  # one row
            allowed = tiles.context_mask(plan, position, c, 1, q_segment, k_segment)
            alive = tiles.positions_alive(plan, start, c, None if k_segment is None else k_segment.T)
            k, v = jnp.where(alive, refs.k[...], 0), jnp.where(alive, refs.v[...], 0)
            _, ds = gradients(k, v, allowed)
            acc_ref[...] += dot(ds.astype(k.dtype), k, (1, 0))

    @pl.when(c == plan.context_tiles - 1)
    def _():
        dq_ref[...] = (acc_ref[...] * plan.scale).astype(dq_ref.dtype)


def _by_context(
    plan: Tiling, known: Prefetched, refs: AttentionOperands, incoming: Incoming, dk_ref, dv_ref, dk_acc, dv_acc
):
    """dk, dv of a context tile over the query tiles that see it; every tile is transposed, with a row per position."""
    b, c, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start, first, last = known.at(b, c)

    @pl.when(i == 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when((first <= i) & (i <= last))
    def _():
        position, _ = tiles.query_places(plan, start, i, 1)
        q_segment = refs.q_segment[...] if plan.segments else None  # one row
        k_segment = refs.k_segment[...].T if plan.segments else None  # one column
        allowed = tiles.context_mask(plan, position, c, 0, q_segment, k_segment)
        alive = tiles.positions_alive(plan, start, c, k_segment)
        k, v = jnp.where(alive, refs.k[...], 0), jnp.where(alive, refs.v[...], 0)
        scores = dot(k, refs.q[...], (1, 1)) * plan.scale
        weights = jnp.where(allowed, jnp.exp(scores - incoming.sums[...]), 0.0)
        ds = weights * (dot(v, incoming.dout[...], (1, 1)) - incoming.delta[...])
        dv_acc[...] += dot(weights.astype(v.dtype), incoming.dout[...], (1, 0))
        dk_acc[...] += dot(ds.astype(k.dtype), refs.q[...], (1, 0))

    @pl.when(i == plan.query_tiles - 1)
    def _():
        dk_ref[...] = (dk_acc[...] * plan.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)


def backward(plan: Tiling, q, context, draft, segments, start, incoming: Incoming, *, interpret: bool):
    """The gradients of q, of the context (or None) and of the draft block (or None), laid out as they are.

    The operands are those of `forward`.
    """
    p = plan
    meets = tiles.tile_meets(p, start, segments)
    how = dict(compiler_params=params("parallel", "parallel", "parallel", "arbitrary"), interpret=interpret)

    of = specs(p)
    operands, out_shape = tiles.operands(p, q, context, draft, segments), (tiles.like(q), tiles.like(draft))
    dq, ddraft = pl.pallas_call(
        functools.partial(_by_query, p),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(p.B, p.K, p.query_tiles, p.context_tiles),
            in_specs=[operands.specs(of), Incoming(of["q"], of["sums"], of["sums"])],
            out_specs=(of["q"], None if draft is None else (of["draft"], of["draft"])),
            scratch_shapes=[pltpu.VMEM((p.rows, p.H), jnp.float32)],
        ),
        cost_estimate=cost((operands, incoming), out_shape, 6 * p.H * scores(p), scores(p)),
        name="mixed_mask_attention_dq",
        **how,
    )(Prefetched(start, *tiles.spans(meets), None), operands, incoming)  # pages have no gradient
    if context is None:
        return dq, None, ddraft

    of = specs(p, by_context=True)
    operands = operands._replace(draft_k=None, draft_v=None)
    dcontext = pl.pallas_call(
        functools.partial(_by_context, p),
        out_shape=tiles.like(context),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(p.B, p.K, p.context_tiles, p.query_tiles),
            in_specs=[operands.specs(of), Incoming(of["q"], of["sums"], of["sums"])],
            out_specs=(of["context"], of["context"]),
            scratch_shapes=[pltpu.VMEM((p.positions, p.H), jnp.float32)] * 2,
        ),
        cost_estimate=cost((operands, incoming), context, 8 * p.H * scores(p), scores(p)),
        name="mixed_mask_attention_dkv",
        **how,
    )(Prefetched(start, *tiles.spans(meets.transpose(0, 2, 1)), None), operands, incoming)
    return dq, dcontext, ddraft
