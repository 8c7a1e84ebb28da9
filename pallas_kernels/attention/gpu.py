"""Mixed-mask attention on CUDA: one program per query tile (or, for dk and dv, per context tile), tiles as on TPU.

The mathematics of the backward is written down in `tpu/attention_backward.py`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention import tiles
from pallas_kernels.attention.tiles import FLOOR, MASKED, Tiling
from pallas_kernels.triton import call, dot, load, store


def _specs(plan: Tiling) -> dict[str, pl.BlockSpec]:
    """Block specs for grid (tile, K, B). "all_*" hold a whole row, of which a body loads tiles."""
    p, Hp = plan, plan.Hp
    return dict(
        start=pl.BlockSpec((None,), lambda i, k, b: (b,)),
        span=pl.BlockSpec((None, None), lambda i, k, b: (b, i)),
        rows=pl.BlockSpec((None, None, p.rows, Hp), lambda i, k, b: (b, k, i, 0)),
        all_rows=pl.BlockSpec((None, None, p.nt * p.rows, Hp), lambda i, k, b: (b, k, 0, 0)),
        sums=pl.BlockSpec((None, None, None, None, p.rows), lambda i, k, b: (b, k, i, 0, 0)),
        all_sums=pl.BlockSpec((None, None, p.nt, None, p.rows), lambda i, k, b: (b, k, 0, 0, 0)),
        slots=pl.BlockSpec((None, None, p.bs, Hp), lambda i, k, b: (b, k, i, 0)),
        all_slots=pl.BlockSpec((None, None, p.ns * p.bs, Hp), lambda i, k, b: (b, k, 0, 0)),
        drafts=pl.BlockSpec((None, None, p.drafts, Hp), lambda i, k, b: (b, k, i, 0)),
        q_segment=pl.BlockSpec((None, None, None, p.rows), lambda i, k, b: (b, i, 0, 0)),
        all_q_segments=pl.BlockSpec((None, p.nt, None, p.rows), lambda i, k, b: (b, 0, 0, 0)),
        all_k_segments=pl.BlockSpec((None, p.ns * p.bs), lambda i, k, b: (b, 0)),
    )


def _head(plan: Tiling) -> jax.Array:
    """bool[1, Hp]: the real part of a padded head of the context."""
    return jax.lax.broadcasted_iota(jnp.int32, (1, plan.Hp), 1) < plan.H


def _slots(plan: Tiling, refs, start, s, segment) -> list[jax.Array]:
    """Tiles s of the context, zeros where a slot is dead: there may be NaN."""
    alive = tiles.slots_alive(plan, start, s, None if segment is None else segment[:, None])
    mask = jnp.broadcast_to(alive & _head(plan), (plan.bs, plan.Hp))
    at = pl.ds(s * plan.bs, plan.bs)
    return [load(ref.at[at, :], mask=mask, other=0.0) for ref in refs]


def _slot_segments(plan: Tiling, ref, s) -> jax.Array | None:
    """i32[bs], 0 past the end."""
    if ref is None:
        return None
    slot = s * plan.bs + jnp.arange(plan.bs, dtype=jnp.int32)
    return load(ref.at[pl.ds(s * plan.bs, plan.bs)], mask=slot < plan.S, other=0)


def _forward_body(plan: Tiling, save_sums: bool, *refs):
    refs = iter(refs)
    start_ref, first_ref, last_ref, q_ref = (next(refs) for _ in range(4))
    k_ref, v_ref = (next(refs), next(refs)) if plan.S else (None, None)
    q_segment_ref, k_segment_ref = (next(refs), next(refs)) if plan.segments else (None, None)
    dk_ref, dv_ref = (next(refs), next(refs)) if plan.draft else (None, None)
    out_ref, *sums_ref = refs

    i, start = pl.program_id(0), start_ref[...]
    q = q_ref[...]
    position, slot = tiles.query_places(plan, start, i, 0)
    q_segment = q_segment_ref[...][:, None] if plan.segments else None

    def absorb(carry, k, v, allowed):
        top, total, acc = carry
        scores = jnp.where(allowed, dot(q, k.T) * plan.scale, MASKED)
        new = jnp.maximum(top, scores.max(axis=1))
        weights, decay = jnp.exp(scores - new[:, None]), jnp.exp(top - new)
        acc = decay[:, None] * acc + dot(weights.astype(v.dtype), v)
        return new, decay * total + weights.sum(axis=1), acc

    def context_tile(s, carry):
        k_segment = _slot_segments(plan, k_segment_ref, s)
        k, v = _slots(plan, (k_ref, v_ref), start, s, k_segment)
        allowed = tiles.context_mask(plan, position, s, 1, q_segment, None if k_segment is None else k_segment[None])
        return absorb(carry, k, v, allowed)

    zeros = jnp.zeros(plan.rows, jnp.float32)
    carry = (zeros + FLOOR, zeros, jnp.zeros(q.shape, jnp.float32))
    if plan.draft:
        allowed = tiles.draft_mask(plan, position, slot, start, i)
        carry = absorb(carry, dk_ref[...], dv_ref[...], allowed)
    if plan.S:
        carry = jax.lax.fori_loop(first_ref[...], last_ref[...] + 1, context_tile, carry)
    top, total, acc = carry
    total = jnp.where(total == 0.0, 1.0, total)
    out_ref[...] = (acc / total[:, None]).astype(out_ref.dtype)
    if save_sums:
        sums_ref[0][...] = top + jnp.log(total)


def forward(plan: Tiling, q, context, draft, segments, start, *, save_sums: bool, interpret: bool):
    """As `tpu.attention_forward.forward`."""
    p, of = plan, _specs(plan)
    first, last = tiles.spans(tiles.tile_meets(p, start, segments))
    operands, in_specs = [start, first, last, q], [of["start"], of["span"], of["span"], of["rows"]]
    if context is not None:
        operands += context
        in_specs += [of["all_slots"]] * 2
    if segments is not None:
        operands += [tiles.fold_segments(p, segments), segments]
        in_specs += [of["q_segment"], of["all_k_segments"]]
    if draft is not None:
        operands += draft
        in_specs += [of["drafts"]] * 2
    out_shape, out_specs = [jax.ShapeDtypeStruct(q.shape, q.dtype)], [of["rows"]]
    if save_sums:
        out_shape.append(jax.ShapeDtypeStruct((p.B, p.K, p.nt, 1, p.rows), jnp.float32))
        out_specs.append(of["sums"])
    out, *sums = call(
        functools.partial(_forward_body, p, save_sums),
        name="mixed_mask_attention",
        grid=(p.nt, p.K, p.B),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        warps=_warps(p, q.dtype),
        interpret=interpret,
    )(*operands)
    return out, sums[0] if sums else None


def _warps(plan: Tiling, dtype) -> int:
    """A tile of 64 rows by 128 keeps a float32 accumulator of 64 registers in each thread of four warps."""
    return 4 if plan.rows * plan.Hp <= 64 * 128 and dtype != jnp.float32 else 8


def _by_query_body(plan: Tiling, *refs):
    refs = iter(refs)
    start_ref, first_ref, last_ref, q_ref, dout_ref, sums_ref, delta_ref = (next(refs) for _ in range(7))
    k_ref, v_ref = (next(refs), next(refs)) if plan.S else (None, None)
    q_segment_ref, k_segment_ref = (next(refs), next(refs)) if plan.segments else (None, None)
    dk_ref, dv_ref = (next(refs), next(refs)) if plan.draft else (None, None)
    dq_ref, *ddraft_refs = refs

    i, start = pl.program_id(0), start_ref[...]
    q, dout = q_ref[...], dout_ref[...]
    sums, delta = sums_ref[...][:, None], delta_ref[...][:, None]
    position, slot = tiles.query_places(plan, start, i, 0)
    q_segment = q_segment_ref[...][:, None] if plan.segments else None

    def gradients(k, v, allowed):
        weights = jnp.where(allowed, jnp.exp(dot(q, k.T) * plan.scale - sums), 0.0)
        return weights, (weights * (dot(dout, v.T) - delta)).astype(k.dtype)

    def context_tile(s, dq):
        k_segment = _slot_segments(plan, k_segment_ref, s)
        k, v = _slots(plan, (k_ref, v_ref), start, s, k_segment)
        allowed = tiles.context_mask(plan, position, s, 1, q_segment, None if k_segment is None else k_segment[None])
        return dq + dot(gradients(k, v, allowed)[1], k)

    dq = jnp.zeros(q.shape, jnp.float32)
    if plan.S:
        dq = jax.lax.fori_loop(first_ref[...], last_ref[...] + 1, context_tile, dq)
    if plan.draft:
        k, v = dk_ref[...], dv_ref[...]
        weights, ds = gradients(k, v, tiles.draft_mask(plan, position, slot, start, i))
        dq = dq + dot(ds, k)
        ddraft_refs[0][...] = (dot(ds.T, q) * plan.scale).astype(k.dtype)
        ddraft_refs[1][...] = dot(weights.astype(v.dtype).T, dout).astype(v.dtype)
    dq_ref[...] = (dq * plan.scale).astype(dq_ref.dtype)


def _by_slot_body(plan: Tiling, *refs):
    refs = iter(refs)
    start_ref, first_ref, last_ref, q_ref, dout_ref, sums_ref, delta_ref, k_ref, v_ref = (next(refs) for _ in range(9))
    q_segment_ref, k_segment_ref = (next(refs), next(refs)) if plan.segments else (None, None)
    dk_ref, dv_ref = refs

    s, start = pl.program_id(0), start_ref[...]
    k_segment = _slot_segments(plan, k_segment_ref, s)
    k_column = None if k_segment is None else k_segment[:, None]
    head = _head(plan)
    alive = jnp.broadcast_to(tiles.slots_alive(plan, start, s, k_column) & head, k_ref.shape)
    k, v = (load(ref, mask=alive, other=0.0) for ref in (k_ref, v_ref))

    def query_tile(i, carry):
        dk, dv = carry
        at = pl.ds(i * plan.rows, plan.rows)
        q, dout = q_ref[at, :], dout_ref[at, :]
        position, _ = tiles.query_places(plan, start, i, 1)
        q_segment = q_segment_ref[i, :][None] if plan.segments else None
        allowed = tiles.context_mask(plan, position, s, 0, q_segment, k_column)
        weights = jnp.where(allowed, jnp.exp(dot(k, q.T) * plan.scale - sums_ref[i, :][None]), 0.0)
        ds = weights * (dot(v, dout.T) - delta_ref[i, :][None])
        return dk + dot(ds.astype(k.dtype), q), dv + dot(weights.astype(v.dtype), dout)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(first_ref[...], last_ref[...] + 1, query_tile, (zeros, zeros))
    real = s * plan.bs + jax.lax.broadcasted_iota(jnp.int32, (plan.bs, 1), 0) < plan.S
    mask = jnp.broadcast_to(real & head, k.shape)
    store(dk_ref, (dk * plan.scale).astype(dk_ref.dtype), mask=mask)
    store(dv_ref, dv.astype(dv_ref.dtype), mask=mask)


def backward(plan: Tiling, q, context, draft, segments, start, sums, delta, dout, *, interpret: bool):
    """As `tpu.attention_backward.backward`; the draft's share of dq has a kernel of its own, which spares registers."""
    p, of = plan, _specs(plan)
    meets = tiles.tile_meets(p, start, segments)
    common = [q, dout, sums, delta]
    run = functools.partial(call, warps=8, interpret=interpret)
    in_specs = [of["start"], of["span"], of["span"], of["rows"], of["rows"], of["sums"], of["sums"]]
    like = lambda *xs: [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs]
    dq, dcontext, ddraft = 0.0, None, None

    if draft is not None:
        dq, *ddraft = run(
            functools.partial(_by_query_body, dataclasses.replace(p, S=0, segments=False)),
            name="mixed_mask_attention_ddraft",
            grid=(p.nt, p.K, p.B),
            in_specs=in_specs + [of["drafts"]] * 2,
            out_specs=[of["rows"]] + [of["drafts"]] * 2,
            out_shape=like(q, *draft),
        )(start, *tiles.spans(meets), *common, *draft)

    if context is not None:
        folded = [] if segments is None else [tiles.fold_segments(p, segments), segments]
        (dq_context,) = run(
            functools.partial(_by_query_body, dataclasses.replace(p, draft=False)),
            name="mixed_mask_attention_dq",
            grid=(p.nt, p.K, p.B),
            in_specs=in_specs + [of["all_slots"]] * 2 + [of["q_segment"], of["all_k_segments"]] * bool(folded),
            out_specs=[of["rows"]],
            out_shape=like(q),
        )(start, *tiles.spans(meets), *common, *context, *folded)
        dcontext = run(
            functools.partial(_by_slot_body, p),
            name="mixed_mask_attention_dkv",
            grid=(p.ns, p.K, p.B),
            in_specs=in_specs[:3]
            + [of["all_rows"]] * 2
            + [of["all_sums"]] * 2
            + [of["slots"]] * 2
            + [of["all_q_segments"], of["all_k_segments"]] * bool(folded),
            out_specs=[of["slots"]] * 2,
            out_shape=like(*context),
        )(start, *tiles.spans(meets.transpose(0, 2, 1)), *common, *context, *folded)
        dq = (dq + dq_context).astype(q.dtype)
    return dq, tuple(dcontext) if dcontext else None, tuple(ddraft) if ddraft else None
