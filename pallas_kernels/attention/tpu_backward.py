"""Mixed-mask attention on TPU, backward: one pass by query tile (dq and the draft's dk, dv), one by context tile.

With p = exp(scale q k^T - logsumexp), delta = sum_h dout * out:
dv = p^T dout,  ds = p * (dout v^T - delta),  dq = scale ds k,  dk = scale ds^T q.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tiles
from pallas_kernels.attention.tiles import Tiling
from pallas_kernels.attention.tpu_forward import VMEM_LIMIT, cost, dot, scores, specs

_PARAMS = dict(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT)


def _by_query(plan: Tiling, *refs):
    """dq of a query tile over its context tiles, and dk, dv of its draft tile."""
    refs = iter(refs)
    start_ref, first_ref, last_ref, q_ref, dout_ref, sums_ref, delta_ref = (next(refs) for _ in range(7))
    k_ref, v_ref = (next(refs), next(refs)) if plan.S else (None, None)
    q_segment_ref, k_segment_ref = (next(refs), next(refs)) if plan.segments else (None, None)
    dk_ref, dv_ref = (next(refs), next(refs)) if plan.draft else (None, None)
    dq_ref = next(refs)
    ddk_ref, ddv_ref = (next(refs), next(refs)) if plan.draft else (None, None)
    (acc_ref,) = refs

    b, i, s = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start, first, last = start_ref[b], first_ref[b, i], last_ref[b, i]
    position, slot = tiles.query_places(plan, start, i, 0)

    def gradients(k, v, allowed):
        scores = dot(q_ref[...], k, (1, 1)) * plan.scale
        weights = jnp.where(allowed, jnp.exp(scores - sums_ref[...].T), 0.0)
        return weights, weights * (dot(dout_ref[...], v, (1, 1)) - delta_ref[...].T)

    @pl.when(s == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        if plan.draft:
            allowed = tiles.draft_mask(plan, position, slot, start, i)
            weights, ds = gradients(dk_ref[...], dv_ref[...], allowed)
            ds = ds.astype(dk_ref.dtype)
            acc_ref[...] += dot(ds, dk_ref[...], (1, 0))
            ddk_ref[...] = (dot(ds, q_ref[...], (0, 0)) * plan.scale).astype(ddk_ref.dtype)
            ddv_ref[...] = dot(weights.astype(dv_ref.dtype), dout_ref[...], (0, 0)).astype(ddv_ref.dtype)

    if plan.S:

        @pl.when((first <= s) & (s <= last))
        def _():
            q_segment = q_segment_ref[...].T if plan.segments else None
            k_segment = k_segment_ref[...] if plan.segments else None
            allowed = tiles.context_mask(plan, position, s, 1, q_segment, k_segment)
            alive = tiles.slots_alive(plan, start, s, None if k_segment is None else k_segment.T)
            k, v = jnp.where(alive, k_ref[...], 0), jnp.where(alive, v_ref[...], 0)
            _, ds = gradients(k, v, allowed)
            acc_ref[...] += dot(ds.astype(k.dtype), k, (1, 0))

    @pl.when(s == plan.ns - 1)
    def _():
        dq_ref[...] = (acc_ref[...] * plan.scale).astype(dq_ref.dtype)


def _by_slot(plan: Tiling, *refs):
    """dk, dv of a context tile over the query tiles that see it; every tile is transposed: [slots, rows]."""
    refs = iter(refs)
    start_ref, first_ref, last_ref, q_ref, dout_ref, sums_ref, delta_ref, k_ref, v_ref = (next(refs) for _ in range(9))
    q_segment_ref, k_segment_ref = (next(refs), next(refs)) if plan.segments else (None, None)
    dk_ref, dv_ref, dk_acc, dv_acc = refs

    b, s, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start, first, last = start_ref[b], first_ref[b, s], last_ref[b, s]

    @pl.when(i == 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when((first <= i) & (i <= last))
    def _():
        position, _ = tiles.query_places(plan, start, i, 1)
        q_segment = q_segment_ref[...] if plan.segments else None  # [1, rows]
        k_segment = k_segment_ref[...].T if plan.segments else None  # [bs, 1]
        allowed = tiles.context_mask(plan, position, s, 0, q_segment, k_segment)
        alive = tiles.slots_alive(plan, start, s, k_segment)
        k, v = jnp.where(alive, k_ref[...], 0), jnp.where(alive, v_ref[...], 0)
        scores = dot(k, q_ref[...], (1, 1)) * plan.scale
        weights = jnp.where(allowed, jnp.exp(scores - sums_ref[...]), 0.0)
        ds = weights * (dot(v, dout_ref[...], (1, 1)) - delta_ref[...])
        dv_acc[...] += dot(weights.astype(v.dtype), dout_ref[...], (1, 0))
        dk_acc[...] += dot(ds.astype(k.dtype), q_ref[...], (1, 0))

    @pl.when(i == plan.nt - 1)
    def _():
        dk_ref[...] = (dk_acc[...] * plan.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)


def backward(plan: Tiling, q, context, draft, segments, start, sums, delta, dout, *, interpret: bool):
    """Folded operands as in `forward`, with sums and delta f32[B, K, nt, 1, rows] and dout like q.

    Returns:
      dq like q; None or (dk, dv) of the context; None or (dk, dv) of the folded draft block.
    """
    p = plan
    meets = tiles.tile_meets(p, start, segments)
    segment_operands = [] if segments is None else [tiles.fold_segments(p, segments), segments[:, None]]
    common = [q, dout, sums, delta]

    of = specs(p)
    operands, in_specs = list(common), [of["rows"], of["rows"], of["sums"], of["sums"]]
    out_shape, out_specs = [jax.ShapeDtypeStruct(q.shape, q.dtype)], [of["rows"]]
    if context is not None:
        operands += context
        in_specs += [of["slots"]] * 2
    if segments is not None:
        operands += segment_operands
        in_specs += [of["q_segment"], of["k_segment"]]
    if draft is not None:
        operands += draft
        in_specs += [of["drafts"]] * 2
        out_shape += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draft]
        out_specs += [of["drafts"]] * 2
    dq, *ddraft = pl.pallas_call(
        functools.partial(_by_query, p),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(p.B, p.K, p.nt, p.ns),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((p.rows, p.H), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(**_PARAMS),
        cost_estimate=cost(operands, out_shape, 6 * p.H * scores(p), scores(p)),
        interpret=interpret,
        name="mixed_mask_attention_dq",
    )(start, *tiles.spans(meets), *operands)
    ddraft = tuple(ddraft) if draft is not None else None
    if context is None:
        return dq, None, ddraft

    of = specs(p, by_slot=True)
    in_specs = [of["rows"], of["rows"], of["sums"], of["sums"], of["slots"], of["slots"]]
    if segments is not None:
        in_specs += [of["q_segment"], of["k_segment"]]
    dcontext = pl.pallas_call(
        functools.partial(_by_slot, p),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in context],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(p.B, p.K, p.ns, p.nt),
            in_specs=in_specs,
            out_specs=[of["slots"]] * 2,
            scratch_shapes=[pltpu.VMEM((p.bs, p.H), jnp.float32)] * 2,
        ),
        compiler_params=pltpu.CompilerParams(**_PARAMS),
        cost_estimate=cost([*common, *context], context, 8 * p.H * scores(p), scores(p)),
        interpret=interpret,
        name="mixed_mask_attention_dkv",
    )(start, *tiles.spans(meets.transpose(0, 2, 1)), *common, *context, *segment_operands)
    return dq, tuple(dcontext), ddraft
