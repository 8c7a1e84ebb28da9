"""Attention over pages on Hopper, by Mosaic GPU: one program per row, key/value head and query tile.

The context is read once per query tile, in tiles that lie in a page each: the hardware copies the next ones to shared
memory while the tensor cores work on one. A product there has 64 rows, so that is what a query tile holds: few queries
leave most of it empty, which costs nothing while reading the context takes longer.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import tiles
from pallas_kernels.attention.tiles import FLOOR, MASKED, Tiling
from pallas_kernels.masks import may_attend
from pallas_kernels.mosaic_gpu import BY_ROW, MATRIX, across, call, index, laid_out, load, operand, product


def _body(
    plan: Tiling, copies, q_ref, k_ref, v_ref, start_ref, last_ref, table_ref, out_ref, q, k, v, weights, q_in, tile_in
):
    p = plan
    b, head, i = (jax.lax.axis_index(name) for name in ("row", "head", "tile"))
    start, tiles_met = start_ref[b], last_ref[b, i] + 1
    rows = (b, head, pl.ds(i * p.rows, p.rows))

    def fetch(c, copy):
        parts = p.p // p.positions
        page, part = table_ref[b, jax.lax.div(c, parts)], jax.lax.rem(c, parts)
        at = (page, head, pl.ds(part * p.positions, p.positions))
        plgpu.copy_gmem_to_smem(k_ref.at[at], k.at[copy], tile_in.at[copy])
        plgpu.copy_gmem_to_smem(v_ref.at[at], v.at[copy], tile_in.at[copy])

    plgpu.copy_gmem_to_smem(q_ref.at[rows], q, q_in)
    for c in range(copies):
        pl.when(c < tiles_met)(functools.partial(fetch, c, c))

    scores_shape, out_shape = (p.rows, p.positions), (p.rows, p.H)
    anchor = jax.lax.div(index(scores_shape, 0), p.per_anchor)
    offset = i * p.anchors + anchor
    q_position = jnp.where((anchor < p.anchors) & (offset < p.T), start + offset, -1)
    plgpu.barrier_wait(q_in)

    def absorb(c, carry):
        top, total, acc = carry
        copy, position = jax.lax.rem(c, copies), c * p.positions
        plgpu.barrier_wait(tile_in.at[copy])
        allowed = may_attend(q_position, position + index(scores_shape, 1))
        scores = jnp.where(allowed, product(q, k.at[copy], transposed=True) * p.scale, MASKED)
        new = jnp.maximum(top, scores.max(axis=1))
        exponentials, decay = jnp.exp(scores - across(new, scores_shape)), jnp.exp(top - new)
        weights[...] = exponentials.astype(weights.dtype)  # rows that this warp alone reads: none is read any more

        @pl.when(position + p.positions > start + p.T)
        def _():  # dead positions, of weight 0, may hold NaN
            alive = position + index((p.positions, p.H), 0) < start + p.T
            v[copy] = jnp.where(alive, load(v, copy, MATRIX), 0.0)

        plgpu.commit_smem()
        acc = acc * across(decay, out_shape) + product(weights, v.at[copy])
        pl.when(c + copies < tiles_met)(functools.partial(fetch, c + copies, copy))
        return new, decay * total + exponentials.sum(axis=1), acc

    zeros = jnp.zeros(p.rows, jnp.float32)
    carry = (
        laid_out(zeros + FLOOR, BY_ROW),
        laid_out(zeros, BY_ROW),
        laid_out(jnp.zeros(out_shape, jnp.float32), MATRIX),
    )
    _, total, acc = jax.lax.fori_loop(0, tiles_met, absorb, carry)
    q[...] = (acc / across(jnp.where(total == 0.0, 1.0, total), out_shape)).astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, out_ref.at[rows])
    plgpu.wait_smem_to_gmem(0)


def forward(plan: Tiling, q, context, draft, segments, start, table, *, save_sums: bool, interpret: bool):
    """As `tpu_forward.forward`, of plain queries over pages alone and without the sums."""
    p = plan
    copies = 256 // p.H  # 64 KB of keys and values on their way; two programs fit into a streaming multiprocessor
    _, last = tiles.spans(tiles.tile_meets(p, start, None))
    context_tiles = operand(copies, p.positions, p.H)
    kernel = call(
        functools.partial(_body, p, copies),
        name="mixed_mask_attention",
        grid=dict(row=p.B, head=p.K, tile=p.query_tiles),
        out_type=[tiles.like(q)],
        scratch=[
            operand(p.rows, p.H), context_tiles, context_tiles, operand(p.rows, p.positions),
            plgpu.Barrier(), plgpu.Barrier(num_arrivals=2, num_barriers=copies),
        ],
    )  # fmt: skip
    return *kernel(q, *context, start, last, table), None
