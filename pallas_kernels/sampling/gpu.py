"""Sampling on CUDA: one program per (row tile, vocabulary tile); the winners of the tiles are compared outside."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.sampling import tiles
from pallas_kernels.sampling.tiles import Best, SampledRows, SamplingOperands, Softmax
from pallas_kernels.triton import call, dot, load, power_of_two, store
from pallas_kernels.tuning import SampleBlocks


def _logits(refs: SamplingOperands, row, column, R: int, V: int, D: int, depth: int) -> jax.Array:
    """The logits of the tile in float32: loaded, or hidden @ head.T in steps of `depth`."""
    if refs.hidden is None:
        x = load(refs.x, mask=(row < R) & (column < V), other=0.0)
        return x.astype(jnp.float32)

    def step(d, acc):
        at = pl.ds(d * depth, depth)
        inside = d * depth + jax.lax.broadcasted_iota(jnp.int32, (1, depth), 1) < D
        h = load(refs.hidden.at[:, at], mask=(row < R) & inside, other=0.0)
        w = load(refs.x.at[:, at], mask=(column.reshape(-1, 1) < V) & inside, other=0.0)
        return acc + dot(h, w.T)

    return jax.lax.fori_loop(0, pl.cdiv(D, depth), step, jnp.zeros((row.shape[0], column.shape[1]), jnp.float32))


def _body(
    R: int,
    V: int,
    D: int,
    tile: SampleBlocks,
    offset_ref,
    sampled_ref,
    refs: SamplingOperands,
    score_ref,
    column_ref,
    softmax_refs: Softmax | None,
):
    i, v = pl.program_id(0), pl.program_id(1)
    row = i * tile.rows + jax.lax.broadcasted_iota(jnp.int32, (tile.rows, 1), 0)
    column = v * tile.columns + jax.lax.broadcasted_iota(jnp.int32, (1, tile.columns), 1)
    in_rows = i * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32) < R
    x = _logits(refs, row, column, R, V, D, tile.depth)
    x = jnp.where(column < V, x, -jnp.inf)

    def noisy():
        if refs.token_ids is None:
            token = column + offset_ref[...]
        else:
            in_columns = v * tile.columns + jnp.arange(tile.columns, dtype=jnp.int32) < V
            token = load(refs.token_ids, mask=in_columns, other=0)[None]
        by_row = (load(ref, mask=in_rows, other=0)[:, None] for ref in refs.rows)
        return tiles.perturb(x, token, *by_row)

    z = jax.lax.cond(sampled_ref[...] != 0, noisy, lambda: x)
    score, winner = tiles.tile_winner(z, column)
    store(score_ref, score, mask=in_rows)
    store(column_ref, winner, mask=in_rows)
    if softmax_refs is not None:
        softmax = tiles.tile_softmax(x)
        store(softmax_refs.top, softmax.top, mask=in_rows)
        store(softmax_refs.mass, softmax.mass, mask=in_rows)


def best(
    hidden, x, rows: SampledRows, token_ids, offset, *, confidence: bool, blocks: SampleBlocks, interpret: bool
) -> Best:
    """As `sampling.tpu.best`."""
    R, V = x.shape if hidden is None else (hidden.shape[0], x.shape[0])
    D = 0 if hidden is None else x.shape[1]
    tile = SampleBlocks(min(power_of_two(R), blocks.rows), blocks.columns, blocks.depth)
    row_tiles, column_tiles = pl.cdiv(R, tile.rows), pl.cdiv(V, tile.columns)

    keys, numbers = tiles.row_operands(rows)
    by_row = (keys[:, 0], keys[:, 1], numbers[:, 0], numbers[:, 1])
    operands = SamplingOperands(hidden, x, by_row, token_ids)
    if hidden is None:
        of_hidden, of_x = None, pl.BlockSpec((tile.rows, tile.columns), lambda i, v: (i, v))
    else:
        padded_D = pl.cdiv(D, tile.depth) * tile.depth
        of_hidden = pl.BlockSpec((tile.rows, padded_D), lambda i, v: (i, 0))
        of_x = pl.BlockSpec((tile.columns, padded_D), lambda i, v: (v, 0))
    of_rows = (pl.BlockSpec((tile.rows,), lambda i, v: (i,)),) * 4
    of_vocabulary = None if token_ids is None else pl.BlockSpec((tile.columns,), lambda i, v: (v,))
    of_offset, of_sampled = pl.BlockSpec((None,), lambda i, v: (0,)), pl.BlockSpec((None,), lambda i, v: (i,))
    numbers, columns = (jax.ShapeDtypeStruct((column_tiles, R), dtype) for dtype in (jnp.float32, jnp.int32))
    out_shape = [numbers, columns, Softmax(numbers, numbers) if confidence else None]
    score, column, softmax = call(
        functools.partial(_body, R, V, D, tile),
        name="sample_logits" if hidden is None else "sample_hidden",
        grid=(row_tiles, column_tiles),
        in_specs=[of_offset, of_sampled, SamplingOperands(of_hidden, of_x, of_rows, of_vocabulary)],
        out_specs=jax.tree.map(lambda _: pl.BlockSpec((None, tile.rows), lambda i, v: (v, i)), out_shape),
        out_shape=out_shape,
        warps=4,
        interpret=interpret,
    )(jnp.reshape(offset, (1,)), rows.tile_samples(tile.rows), operands)
    return tiles.best_of_tiles(score, column, softmax)
