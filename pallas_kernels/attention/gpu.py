"""Mixed-mask attention on CUDA: one program per query tile (or, for dk and dv, per context tile), tiles as on TPU.

The mathematics of the backward is written down in `tpu_backward.py`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention import tiles
from pallas_kernels.attention.tiles import FLOOR, MASKED, AttentionOperands, Incoming, Tiling
from pallas_kernels.triton import call, dot, load, store


def _of_a_tile(plan: Tiling) -> dict[str, pl.BlockSpec]:
    """Block specs by kind of operand, for a grid (tiles, K, B): what belongs to one tile."""
    p, H = plan, plan.padded_H
    return dict(
        start=pl.BlockSpec((None,), lambda tile, k, b: (b,)),
        span=pl.BlockSpec((None, None), lambda tile, k, b: (b, tile)),
        q=pl.BlockSpec((None, None, p.rows, H), lambda tile, k, b: (b, k, tile, 0)),
        sums=pl.BlockSpec((None, None, None, None, p.rows), lambda tile, k, b: (b, k, tile, 0, 0)),
        q_segment=pl.BlockSpec((None, None, None, p.rows), lambda tile, k, b: (b, tile, 0, 0)),
        draft=pl.BlockSpec((None, None, p.drafts, H), lambda tile, k, b: (b, k, tile, 0)),
        context=pl.BlockSpec((None, None, p.positions, H), lambda tile, k, b: (b, k, tile, 0)),
    )


def _of_a_row(plan: Tiling) -> dict[str, pl.BlockSpec]:
    """Likewise, but what belongs to a whole row, of which a body loads tile after tile."""
    p, H = plan, plan.padded_H
    return dict(
        q=pl.BlockSpec((None, None, p.query_tiles * p.rows, H), lambda tile, k, b: (b, k, 0, 0)),
        sums=pl.BlockSpec((None, None, p.query_tiles, None, p.rows), lambda tile, k, b: (b, k, 0, 0, 0)),
        q_segment=pl.BlockSpec((None, p.query_tiles, None, p.rows), lambda tile, k, b: (b, 0, 0, 0)),
        context=pl.BlockSpec((None, None, p.context_tiles * p.positions, H), lambda tile, k, b: (b, k, 0, 0)),
        k_segment=pl.BlockSpec((None, None, p.context_tiles * p.positions), lambda tile, k, b: (b, 0, 0)),
    )


def _forward_specs(plan: Tiling, context) -> dict[str, pl.BlockSpec]:
    """Those of `_by_query_specs`; of a paged context a program sees all pages of its key/value head."""
    p, specs = plan, _by_query_specs(plan)
    if p.p:
        specs["table"] = pl.BlockSpec((None, p.C // p.p), lambda tile, k, b: (b, 0))
        specs["context"] = pl.BlockSpec((context[0].shape[0], None, p.p, p.padded_H), lambda tile, k, b: (0, k, 0, 0))
    return specs


def _by_query_specs(plan: Tiling) -> dict[str, pl.BlockSpec]:
    """Where a program has one query tile and walks over the context of its row."""
    row = _of_a_row(plan)
    return _of_a_tile(plan) | {kind: row[kind] for kind in ("context", "k_segment")}


def _by_context_specs(plan: Tiling) -> dict[str, pl.BlockSpec]:
    """Where a program has one context tile and walks over the queries of its row."""
    row = _of_a_row(plan)
    return _of_a_tile(plan) | {kind: row[kind] for kind in ("q", "sums", "q_segment", "k_segment")}


def _real_head(plan: Tiling) -> jax.Array:
    """Which columns of a padded head of the context are real."""
    return jax.lax.broadcasted_iota(jnp.int32, (1, plan.padded_H), 1) < plan.H


def _context_tile(
    plan: Tiling, refs: AttentionOperands, start, c, segment, table_ref=None
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of tile c of a row's context, zeros where a position is dead: there may be NaN."""
    alive = tiles.positions_alive(plan, start, c, None if segment is None else segment[:, None])
    mask = jnp.broadcast_to(alive & _real_head(plan), (plan.positions, plan.padded_H))
    if table_ref is None:
        at = (pl.ds(c * plan.positions, plan.positions), slice(None))
    else:
        parts = plan.p // plan.positions
        page, part = jax.lax.div(c, parts), jax.lax.rem(c, parts)
        at = (table_ref[page], pl.ds(part * plan.positions, plan.positions), slice(None))
    return tuple(load(ref.at[at], mask=mask, other=0.0) for ref in (refs.k, refs.v))


def _context_segments(plan: Tiling, refs: AttentionOperands, c) -> jax.Array | None:
    """The documents of the positions of a context tile, 0 past the end; None where none are packed."""
    if not plan.segments:
        return None
    position = c * plan.positions + jnp.arange(plan.positions, dtype=jnp.int32)
    return load(refs.k_segment.at[pl.ds(c * plan.positions, plan.positions)], mask=position < plan.C, other=0)


def _forward_body(plan: Tiling, start_ref, first_ref, last_ref, table_ref, refs: AttentionOperands, out_ref, sums_ref):
    i, start = pl.program_id(0), start_ref[...]
    q = refs.q[...]
    position, slot = tiles.query_places(plan, start, i, 0)
    q_segment = refs.q_segment[...][:, None] if plan.segments else None

    def absorb(carry, k, v, allowed):
        top, total, acc = carry
        scores = jnp.where(allowed, dot(q, k.T) * plan.scale, MASKED)
        new = jnp.maximum(top, scores.max(axis=1))
        weights, decay = jnp.exp(scores - new[:, None]), jnp.exp(top - new)
        acc = decay[:, None] * acc + dot(weights.astype(v.dtype), v)
        return new, decay * total + weights.sum(axis=1), acc

    def absorb_context(c, carry):
        k_segment = _context_segments(plan, refs, c)
        k, v = _context_tile(plan, refs, start, c, k_segment, table_ref)
        allowed = tiles.context_mask(plan, position, c, 1, q_segment, None if k_segment is None else k_segment[None])
        return absorb(carry, k, v, allowed)

    zeros = jnp.zeros(plan.rows, jnp.float32)
    carry = (zeros + FLOOR, zeros, jnp.zeros(q.shape, jnp.float32))
    if plan.draft:
        allowed = tiles.draft_mask(plan, position, slot, start, i)
        carry = absorb(carry, refs.draft_k[...], refs.draft_v[...], allowed)
    if plan.C:
        carry = jax.lax.fori_loop(first_ref[...], last_ref[...] + 1, absorb_context, carry)
    top, total, acc = carry
    total = jnp.where(total == 0.0, 1.0, total)
    out_ref[...] = (acc / total[:, None]).astype(out_ref.dtype)
    if sums_ref is not None:
        sums_ref[...] = top + jnp.log(total)


def forward(plan: Tiling, q, context, draft, segments, start, table, *, save_sums: bool, interpret: bool):
    """As `tpu_forward.forward`."""
    p, of = plan, _forward_specs(plan, context)
    operands = tiles.operands(p, q, context, draft, segments)
    sums = jax.ShapeDtypeStruct((p.B, p.K, p.query_tiles, 1, p.rows), jnp.float32) if save_sums else None
    return call(
        functools.partial(_forward_body, p),
        name="mixed_mask_attention",
        grid=(p.query_tiles, p.K, p.B),
        in_specs=[of["start"], of["span"], of["span"], of.get("table"), operands.specs(of)],
        out_specs=[of["q"], of["sums"] if save_sums else None],
        out_shape=[tiles.like(q), sums],
        warps=_warps(p, q.dtype),
        interpret=interpret,
    )(start, *tiles.spans(tiles.tile_meets(p, start, segments)), table, operands)


def _warps(plan: Tiling, dtype) -> int:
    """A tile of 64 rows by 128 keeps a float32 accumulator of 64 registers in each thread of four warps."""
    return 4 if plan.rows * plan.padded_H <= 64 * 128 and dtype != jnp.float32 else 8


def _by_query_body(
    plan: Tiling, start_ref, first_ref, last_ref, refs: AttentionOperands, incoming: Incoming, dq_ref, ddraft_refs
):
    i, start = pl.program_id(0), start_ref[...]
    q, dout = refs.q[...], incoming.dout[...]
    sums, delta = incoming.sums[...][:, None], incoming.delta[...][:, None]
    position, slot = tiles.query_places(plan, start, i, 0)
    q_segment = refs.q_segment[...][:, None] if plan.segments else None

    def gradients(k, v, allowed):
        weights = jnp.where(allowed, jnp.exp(dot(q, k.T) * plan.scale - sums), 0.0)
        return weights, (weights * (dot(dout, v.T) - delta)).astype(k.dtype)

    def add_context(c, dq):
        k_segment = _context_segments(plan, refs, c)
        k, v = _context_tile(plan, refs, start, c, k_segment)
        allowed = tiles.context_mask(plan, position, c, 1, q_segment, None if k_segment is None else k_segment[None])
        return dq + dot(gradients(k, v, allowed)[1], k)

    dq = jnp.zeros(q.shape, jnp.float32)
    if plan.C:
        dq = jax.lax.fori_loop(first_ref[...], last_ref[...] + 1, add_context, dq)
    if plan.draft:
        dk_ref, dv_ref = ddraft_refs
        k, v = refs.draft_k[...], refs.draft_v[...]
        weights, ds = gradients(k, v, tiles.draft_mask(plan, position, slot, start, i))
        dq = dq + dot(ds, k)
        dk_ref[...] = (dot(ds.T, q) * plan.scale).astype(k.dtype)
        dv_ref[...] = dot(weights.astype(v.dtype).T, dout).astype(v.dtype)
    dq_ref[...] = (dq * plan.scale).astype(dq_ref.dtype)


def _by_context_body(
    plan: Tiling, start_ref, first_ref, last_ref, refs: AttentionOperands, incoming: Incoming, dk_ref, dv_ref
):
    c, start = pl.program_id(0), start_ref[...]
    k_segment = _context_segments(plan, refs, c)
    k_column = None if k_segment is None else k_segment[:, None]
    real_head = _real_head(plan)
    alive = jnp.broadcast_to(tiles.positions_alive(plan, start, c, k_column) & real_head, refs.k.shape)
    k, v = (load(ref, mask=alive, other=0.0) for ref in (refs.k, refs.v))

    def add_queries(i, carry):
        dk, dv = carry
        at = pl.ds(i * plan.rows, plan.rows)
        q, dout = refs.q[at, :], incoming.dout[at, :]
        position, _ = tiles.query_places(plan, start, i, 1)
        q_segment = refs.q_segment[i, :][None] if plan.segments else None
        allowed = tiles.context_mask(plan, position, c, 0, q_segment, k_column)
        weights = jnp.where(allowed, jnp.exp(dot(k, q.T) * plan.scale - incoming.sums[i, :][None]), 0.0)
        ds = weights * (dot(v, dout.T) - incoming.delta[i, :][None])
        return dk + dot(ds.astype(k.dtype), q), dv + dot(weights.astype(v.dtype), dout)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(first_ref[...], last_ref[...] + 1, add_queries, (zeros, zeros))
    real = c * plan.positions + jax.lax.broadcasted_iota(jnp.int32, (plan.positions, 1), 0) < plan.C
    mask = jnp.broadcast_to(real & real_head, k.shape)
    store(dk_ref, (dk * plan.scale).astype(dk_ref.dtype), mask=mask)
    store(dv_ref, dv.astype(dv_ref.dtype), mask=mask)


def backward(plan: Tiling, q, context, draft, segments, start, incoming: Incoming, *, interpret: bool):
    """As `tpu_backward.backward`; the draft's share of dq has a kernel of its own, which spares registers."""
    p = plan
    meets = tiles.tile_meets(p, start, segments)
    run = functools.partial(call, warps=8, interpret=interpret)

    def by_query(name: str, plan: Tiling, operands: AttentionOperands, draft):
        of = _by_query_specs(plan)
        return run(
            functools.partial(_by_query_body, plan),
            name=name,
            grid=(p.query_tiles, p.K, p.B),
            in_specs=[
                of["start"], of["span"], of["span"], operands.specs(of), Incoming(of["q"], of["sums"], of["sums"])
            ],
            out_specs=[of["q"], None if draft is None else (of["draft"], of["draft"])],
            out_shape=[tiles.like(q), tiles.like(draft)],
        )(start, *tiles.spans(meets), operands, incoming)  # fmt: skip

    dq, dcontext, ddraft = 0.0, None, None
    if draft is not None:
        alone = dataclasses.replace(p, C=0, segments=False)
        dq, ddraft = by_query("mixed_mask_attention_ddraft", alone, tiles.operands(p, q, None, draft, None), draft)
    if context is not None:
        operands = tiles.operands(p, q, context, None, segments)
        alone = dataclasses.replace(p, draft=False)
        dq_context, _ = by_query("mixed_mask_attention_dq", alone, operands, None)
        of = _by_context_specs(p)
        dcontext = run(
            functools.partial(_by_context_body, p),
            name="mixed_mask_attention_dkv",
            grid=(p.context_tiles, p.K, p.B),
            in_specs=[
                of["start"], of["span"], of["span"], operands.specs(of), Incoming(of["q"], of["sums"], of["sums"])
            ],
            out_specs=[of["context"], of["context"]],
            out_shape=tiles.like(context),
        )(start, *tiles.spans(meets.transpose(0, 2, 1)), operands, incoming)  # fmt: skip
        dq = (dq + dq_context).astype(q.dtype)
    return dq, dcontext, ddraft
