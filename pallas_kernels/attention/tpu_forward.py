"""Mixed-mask attention on TPU, forward: an online softmax over the context tiles and the draft tile."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tiles
from pallas_kernels.attention.tiles import FLOOR, MASKED, Tiling

VMEM_LIMIT = 64 * 2**20  # bytes; every chip that is compiled for has at least this


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of two tiles over one axis each, accumulated in float32; float32 operands are not rounded to bfloat16."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def cost(operands, results, flops: int, transcendentals: int = 0) -> pl.CostEstimate:
    """What a call costs, for XLA's scheduler and reports: every operand read once, every result written once."""
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, *results))
    return pl.CostEstimate(flops=flops, bytes_accessed=size, transcendentals=transcendentals)


def scores(plan: Tiling) -> int:
    """How many scores a pass computes if every row is full: lengths are not known here."""
    return plan.B * plan.K * plan.nt * plan.rows * (plan.S + plan.drafts * plan.draft)


def scalars(plan: Tiling, start, segments) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is prefetched: start i32[B], and the first and last context tile of each query tile, i32[B, nt]."""
    first, last = tiles.spans(tiles.tile_meets(plan, start, segments))
    return start, first, last


def specs(plan: Tiling, *, by_slot: bool = False) -> dict[str, pl.BlockSpec]:
    """Block specs by kind of operand, for grid (B, K, nt, ns), or (B, K, ns, nt) with `by_slot`.

    The inner axis is clamped to the tiles that are met: a tile that is skipped repeats the index of its neighbour, so
    nothing is fetched for it.
    """

    def inner(s, b, i, first, last):
        return jnp.clip(s, first[b, i], jnp.maximum(last[b, i], first[b, i]))

    def query(b, i, s, first, last):
        return inner(s, b, i, first, last) if by_slot else i

    def slot(b, i, s, first, last):
        return i if by_slot else inner(s, b, i, first, last)

    p = plan
    rows = pl.BlockSpec((None, None, p.rows, p.H), lambda b, k, i, s, st, f, e: (b, k, query(b, i, s, f, e), 0))
    sums = pl.BlockSpec((None, None, None, 1, p.rows), lambda b, k, i, s, st, f, e: (b, k, query(b, i, s, f, e), 0, 0))
    slots = pl.BlockSpec((None, None, p.bs, p.H), lambda b, k, i, s, st, f, e: (b, k, slot(b, i, s, f, e), 0))
    drafts = pl.BlockSpec((None, None, p.drafts, p.H), lambda b, k, i, s, st, f, e: (b, k, i, 0))
    q_segment = pl.BlockSpec((None, None, 1, p.rows), lambda b, k, i, s, st, f, e: (b, query(b, i, s, f, e), 0, 0))
    k_segment = pl.BlockSpec((None, 1, p.bs), lambda b, k, i, s, st, f, e: (b, 0, slot(b, i, s, f, e)))
    return dict(rows=rows, sums=sums, slots=slots, drafts=drafts, q_segment=q_segment, k_segment=k_segment)


def _body(plan: Tiling, save_sums: bool, *refs):
    refs = iter(refs)
    start_ref, first_ref, last_ref, q_ref = (next(refs) for _ in range(4))
    k_ref, v_ref = (next(refs), next(refs)) if plan.S else (None, None)
    q_segment_ref, k_segment_ref = (next(refs), next(refs)) if plan.segments else (None, None)
    dk_ref, dv_ref = (next(refs), next(refs)) if plan.draft else (None, None)
    out_ref = next(refs)
    sums_ref = next(refs) if save_sums else None
    top_ref, total_ref, acc_ref = refs

    b, i, s = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start, first, last = start_ref[b], first_ref[b, i], last_ref[b, i]

    def absorb(scores, allowed, values):
        scores = jnp.where(allowed, scores * plan.scale, MASKED)
        top = jnp.maximum(top_ref[...], scores.max(axis=1, keepdims=True))
        weights, decay = jnp.exp(scores - top), jnp.exp(top_ref[...] - top)
        top_ref[...] = top
        total_ref[...] = decay * total_ref[...] + weights.sum(axis=1, keepdims=True)
        acc_ref[...] = decay * acc_ref[...] + dot(weights.astype(values.dtype), values, (1, 0))

    @pl.when(s == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, FLOOR)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        if plan.draft:
            position, slot = tiles.query_places(plan, start, i, 0)
            allowed = tiles.draft_mask(plan, position, slot, start, i)
            absorb(dot(q_ref[...], dk_ref[...], (1, 1)), allowed, dv_ref[...])

    if plan.S:

        @pl.when((first <= s) & (s <= last))
        def _():
            position, _ = tiles.query_places(plan, start, i, 0)
            q_segment = q_segment_ref[...].T if plan.segments else None  # [rows, 1]
            k_segment = k_segment_ref[...] if plan.segments else None  # [1, bs]
            allowed = tiles.context_mask(plan, position, s, 1, q_segment, k_segment)
            alive = tiles.slots_alive(plan, start, s, None if k_segment is None else k_segment.T)
            values = jnp.where(alive, v_ref[...], 0)  # 0 * NaN would be NaN
            absorb(dot(q_ref[...], k_ref[...], (1, 1)), allowed, values)

    @pl.when(s == plan.ns - 1)
    def _():
        total = total_ref[...]
        total = jnp.where(total == 0.0, 1.0, total)  # attends nothing: zeros
        out_ref[...] = (acc_ref[...] / total).astype(out_ref.dtype)
        if save_sums:
            sums_ref[...] = (top_ref[...] + jnp.log(total)).T


def forward(plan: Tiling, q, context, draft, segments, start, *, save_sums: bool, interpret: bool):
    """Folded operands -> out [B, K, nt * rows, H] and, with `save_sums`, log-sum-exps f32[B, K, nt, 1, rows].

    Args:
      q: [B, K, nt * rows, H] (`tiles.fold`).
      context: None or (k, v), each [B, K, S, H].
      draft: None or (k, v), each [B, K, nt * drafts, H] (`tiles.fold_draft`).
      segments: None or i32[B, T].
      start: i32[B].
    """
    p = plan
    of = specs(p)
    operands, in_specs = [q], [of["rows"]]
    if context is not None:
        operands += context
        in_specs += [of["slots"]] * 2
    if segments is not None:
        operands += [tiles.fold_segments(p, segments), segments[:, None]]
        in_specs += [of["q_segment"], of["k_segment"]]
    if draft is not None:
        operands += draft
        in_specs += [of["drafts"]] * 2
    out_shape, out_specs = [jax.ShapeDtypeStruct(q.shape, q.dtype)], [of["rows"]]
    if save_sums:
        out_shape.append(jax.ShapeDtypeStruct((p.B, p.K, p.nt, 1, p.rows), jnp.float32))
        out_specs.append(of["sums"])
    out, *sums = pl.pallas_call(
        functools.partial(_body, p, save_sums),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(p.B, p.K, p.nt, p.ns),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((p.rows, 1), jnp.float32),
                pltpu.VMEM((p.rows, 1), jnp.float32),
                pltpu.VMEM((p.rows, p.H), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=cost(operands, out_shape, 4 * p.H * scores(p), scores(p)),
        interpret=interpret,
        name="mixed_mask_attention",
    )(*scalars(p, start, segments), *operands)
    return out, sums[0] if sums else None
