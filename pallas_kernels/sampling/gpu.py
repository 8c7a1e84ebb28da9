"""Sampling on CUDA: one program per (row tile, vocabulary tile); a handful of numbers per tile are reduced outside."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.sampling.tile import Best, perturb, row_operands, tile_winner
from pallas_kernels.triton import call, dot, load, power_of_two, store
from pallas_kernels.tuning import SampleBlocks


def _logits(hidden_ref, x_ref, row, column, R: int, V: int, D: int, depth: int) -> jax.Array:
    """f32[br, bv] of the tile: loaded, or hidden @ head.T in steps of `depth`."""
    if hidden_ref is None:
        x = load(x_ref, mask=(row < R) & (column < V), other=0.0)
        return x.astype(jnp.float32)

    def step(d, acc):
        at = pl.ds(d * depth, depth)
        inside = d * depth + jax.lax.broadcasted_iota(jnp.int32, (1, depth), 1) < D
        h = load(hidden_ref.at[:, at], mask=(row < R) & inside, other=0.0)
        w = load(x_ref.at[:, at], mask=(column.reshape(-1, 1) < V) & inside, other=0.0)
        return acc + dot(h, w.T)

    return jax.lax.fori_loop(0, pl.cdiv(D, depth), step, jnp.zeros((row.shape[0], column.shape[1]), jnp.float32))


def _body(sizes, fused: bool, mapped: bool, with_logprob: bool, *refs):
    R, V, D, br, bv, depth = sizes
    refs = iter(refs)
    offset_ref, sampled_ref = next(refs), next(refs)
    hidden_ref = next(refs) if fused else None
    x_ref, *row_refs = (next(refs) for _ in range(5))
    ids_ref = next(refs) if mapped else None
    score_ref, column_ref, *logprob_refs = refs

    i, v = pl.program_id(0), pl.program_id(1)
    row = i * br + jax.lax.broadcasted_iota(jnp.int32, (br, 1), 0)
    column = v * bv + jax.lax.broadcasted_iota(jnp.int32, (1, bv), 1)
    in_rows = i * br + jnp.arange(br, dtype=jnp.int32) < R
    x = _logits(hidden_ref, x_ref, row, column, R, V, D, depth)
    x = jnp.where(column < V, x, -jnp.inf)

    def noisy():
        if mapped:
            in_columns = v * bv + jnp.arange(bv, dtype=jnp.int32) < V
            token = load(ids_ref, mask=in_columns, other=0)[None]
        else:
            token = column + offset_ref[...]
        first, second, temperature, threshold = (load(ref, mask=in_rows, other=0)[:, None] for ref in row_refs)
        return perturb(x, token, first, second, temperature, threshold)

    z = jax.lax.cond(sampled_ref[...] != 0, noisy, lambda: x)
    score, winner = tile_winner(z, column)
    store(score_ref, score, mask=in_rows)
    store(column_ref, winner, mask=in_rows)
    if with_logprob:
        raw_ref, top_ref, total_ref = logprob_refs
        store(raw_ref, jnp.sum(jnp.where(column == winner[:, None], x, 0.0), axis=1), mask=in_rows)
        top = jnp.maximum(x.max(axis=1), -1e30)
        store(top_ref, top, mask=in_rows)
        store(total_ref, jnp.exp(x - top[:, None]).sum(axis=1), mask=in_rows)


def best(
    hidden, x, *, seed, position, temperature, threshold, token_ids, offset, with_logprob: bool, blocks: SampleBlocks,
    interpret: bool,
) -> Best:  # fmt: skip
    """As `tpu.sample.best`."""
    fused = hidden is not None
    R, V = (hidden.shape[0], x.shape[0]) if fused else x.shape
    D = x.shape[1] if fused else 0
    br, bv, depth = min(power_of_two(R), blocks.rows), blocks.columns, blocks.depth
    nr, nv = pl.cdiv(R, br), pl.cdiv(V, bv)
    keys, params = row_operands(seed, position, temperature, threshold)
    sampled = jnp.pad(temperature > 0, (0, nr * br - R)).reshape(nr, br).any(axis=1).astype(jnp.int32)

    operands = [jnp.reshape(offset, (1,)), sampled]
    in_specs = [pl.BlockSpec((None,), lambda i, v: (0,)), pl.BlockSpec((None,), lambda i, v: (i,))]
    if fused:
        Dp = pl.cdiv(D, depth) * depth
        operands += [hidden, x]
        in_specs += [pl.BlockSpec((br, Dp), lambda i, v: (i, 0)), pl.BlockSpec((bv, Dp), lambda i, v: (v, 0))]
    else:
        operands += [x]
        in_specs += [pl.BlockSpec((br, bv), lambda i, v: (i, v))]
    operands += [keys[:, 0], keys[:, 1], params[:, 0], params[:, 1]]
    in_specs += [pl.BlockSpec((br,), lambda i, v: (i,))] * 4
    if token_ids is not None:
        operands += [token_ids]
        in_specs += [pl.BlockSpec((bv,), lambda i, v: (v,))]
    dtypes = [jnp.float32, jnp.int32] + [jnp.float32] * 3 * with_logprob
    score, column, *logprob = call(
        functools.partial(_body, (R, V, D, br, bv, depth), fused, token_ids is not None, with_logprob),
        name="sample_hidden" if fused else "sample_logits",
        grid=(nr, nv),
        in_specs=in_specs,
        out_specs=[pl.BlockSpec((None, br), lambda i, v: (v, i))] * len(dtypes),
        out_shape=[jax.ShapeDtypeStruct((nv, R), d) for d in dtypes],
        warps=4,
        interpret=interpret,
    )(*operands)
    tile = jnp.argmax(score, axis=0)[None]  # the first tile of the highest score: the lowest column
    pick = lambda a: jnp.take_along_axis(a, tile, axis=0)[0]
    column = jnp.where(pick(score) > -jnp.inf, pick(column), 0)  # 0 for NaN too, as on TPU
    if not with_logprob:
        return Best(pick(score), column, None, None)
    raw, tops, totals = logprob
    top = tops.max(axis=0)
    return Best(pick(score), column, pick(raw), top + jnp.log((totals * jnp.exp(tops - top)).sum(axis=0)))
