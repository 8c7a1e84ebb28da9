"""Mixed-mask attention on TPU, forward: an online softmax over the context tiles and the draft tile."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tiles
from pallas_kernels.attention.tiles import FLOOR, MASKED, AttentionOperands, Prefetched, Tiling
from pallas_kernels.mosaic import cost, dot, params


def scores(plan: Tiling) -> int:
    """How many scores a pass computes if every row is full: lengths are not known here."""
    return plan.B * plan.K * plan.query_tiles * plan.rows * (plan.C + plan.drafts * plan.draft)


def specs(plan: Tiling, *, by_context: bool = False) -> dict[str, pl.BlockSpec]:
    """Block specs by kind of operand.

    The grid is (B, K, query tiles, context tiles), or with `by_context` (B, K, context tiles, query tiles). Its inner
    axis is clamped to the tiles that the outer one meets: a tile that is skipped repeats the index of its neighbour,
    so nothing is fetched for it. A paged context has a spec for each page of a tile, which the row's table finds.
    """

    def by_outer(shape, index):
        def met(b, k, outer, inner, known):
            return index(b, k, outer, known)

        return pl.BlockSpec(shape, met)

    def by_inner(shape, index):
        def met(b, k, outer, inner, known):
            _, first, last = known.at(b, outer)
            return index(b, k, jnp.clip(inner, first, jnp.maximum(last, first)), known)

        return pl.BlockSpec(shape, met)

    def page(number):
        def index(b, k, tile, known):
            last = jax.lax.div(jnp.clip(known.start[b] + p.T, 1, p.C) - 1, p.p)
            return known.table[b, jnp.minimum(tile * p.tile_pages + number, last)], k, 0, 0

        return context((None, None, p.p, p.H), index)

    p = plan
    query, context = (by_inner, by_outer) if by_context else (by_outer, by_inner)
    return dict(
        q=query((None, None, p.rows, p.H), lambda b, k, tile, _: (b, k, tile, 0)),
        sums=query((None, None, None, 1, p.rows), lambda b, k, tile, _: (b, k, tile, 0, 0)),
        q_segment=query((None, None, 1, p.rows), lambda b, k, tile, _: (b, tile, 0, 0)),
        draft=query((None, None, p.drafts, p.H), lambda b, k, tile, _: (b, k, tile, 0)),
        context=tuple(page(number) for number in range(p.tile_pages))
        if p.p
        else context((None, None, p.positions, p.H), lambda b, k, tile, _: (b, k, tile, 0)),
        k_segment=context((None, 1, p.positions), lambda b, k, tile, _: (b, 0, tile)),
    )


def _body(plan: Tiling, known: Prefetched, refs: AttentionOperands, out_ref, sums_ref, top_ref, total_ref, acc_ref):
    b, i, c = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start, first, last = known.at(b, i)

    def absorb(scores, allowed, values):
        scores = jnp.where(allowed, scores * plan.scale, MASKED)
        top = jnp.maximum(top_ref[...], scores.max(axis=1, keepdims=True))
        weights, decay = jnp.exp(scores - top), jnp.exp(top_ref[...] - top)
        top_ref[...] = top
        total_ref[...] = decay * total_ref[...] + weights.sum(axis=1, keepdims=True)
        acc_ref[...] = decay * acc_ref[...] + dot(weights.astype(values.dtype), values, (1, 0))

    @pl.when(c == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, FLOOR)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        if plan.draft:
            position, slot = tiles.query_places(plan, start, i, 0)
            allowed = tiles.draft_mask(plan, position, slot, start, i)
            absorb(dot(refs.q[...], refs.draft_k[...], (1, 1)), allowed, refs.draft_v[...])

    if plan.C:

        @pl.when((first <= c) & (c <= last))
        def _():
            position, _ = tiles.query_places(plan, start, i, 0)
            q_segment = refs.q_segment[...].T if plan.segments else None  # one column
            k_segment = refs.k_segment[...] if plan.segments else None  # one row
            allowed = tiles.context_mask(plan, position, c, 1, q_segment, k_segment)
            alive = tiles.positions_alive(plan, start, c, None if k_segment is None else k_segment.T)
            values = jnp.where(alive, _positions(refs.v), 0)  # 0 * NaN would be NaN
            absorb(dot(refs.q[...], _positions(refs.k), (1, 1)), allowed, values)

    @pl.when(c == plan.context_tiles - 1)
    def _():
        total = total_ref[...]
        total = jnp.where(total == 0.0, 1.0, total)  # attends nothing: zeros
        out_ref[...] = (acc_ref[...] / total).astype(out_ref.dtype)
        if sums_ref is not None:
            sums_ref[...] = (top_ref[...] + jnp.log(total)).T


def _positions(refs) -> jax.Array:
    """The keys or values of a context tile, those of its pages side by side."""
    return jnp.concatenate([ref[...] for ref in refs]) if isinstance(refs, tuple) else refs[...]


def forward(plan: Tiling, q, context, draft, segments, start, table, *, save_sums: bool, interpret: bool):
    """The folded output and, with `save_sums`, the log-sum-exp of each query row as `tiles.fold_sums` keeps them.

    Args:
      plan: how the call is tiled.
      q: the queries as `tiles.fold` lays them out.
      context: None or the keys and values of the context, or of the pages that the table names.
      draft: None or the keys and values of the draft block, each as `tiles.fold_draft` lays them out.
      segments: None or each token's document.
      start: the position of each row's first anchor.
      table: None or the pages of each row.
      save_sums: whether a backward pass will follow.
      interpret: whether the kernel is simulated.
    """
    p, of = plan, specs(plan)
    # A kernel's block is one piece of an array, so pages that may lie anywhere are as many operands.
    pages = tuple((x,) * p.tile_pages for x in context) if p.p else context
    operands = tiles.operands(p, q, pages, draft, segments)
    sums = jax.ShapeDtypeStruct((p.B, p.K, p.query_tiles, 1, p.rows), jnp.float32) if save_sums else None
    out_shape = (tiles.like(q), sums)
    column = pltpu.VMEM((p.rows, 1), jnp.float32)
    return pl.pallas_call(
        functools.partial(_body, p),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(p.B, p.K, p.query_tiles, p.context_tiles),
            in_specs=[operands.specs(of)],
            out_specs=(of["q"], of["sums"] if save_sums else None),
            scratch_shapes=[column, column, pltpu.VMEM((p.rows, p.H), jnp.float32)],
        ),
        compiler_params=params("parallel", "parallel", "parallel", "arbitrary"),
        cost_estimate=cost((q, context, draft, segments), out_shape, 4 * p.H * scores(p), scores(p)),
        interpret=interpret,
        name="mixed_mask_attention",
    )(Prefetched(start, *tiles.spans(tiles.tile_meets(p, start, segments)), table), operands)
