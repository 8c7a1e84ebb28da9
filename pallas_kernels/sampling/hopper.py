"""Sampling from hidden states on Hopper, by Mosaic GPU: one program per (vocabulary tile, row tile).

The row tiles of a vocabulary tile follow one another, so that all but the first find its part of the LM head in the
second-level cache. The winners of the tiles are compared outside.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import BY_COLUMN, BY_ROW, SWIZZLED, across, call, index, load, multiply_add
from pallas_kernels.sampling import tiles
from pallas_kernels.sampling.tiles import Best, SampledRows, Softmax
from pallas_kernels.tuning import SampleBlocks

_COPIES = 4  # how many steps of the product are on their way to shared memory
_COLUMNS = 64  # how many columns of a tile are looked at together, for what registers hold


def _log1p(x: jax.Array) -> jax.Array:
    """log(1 + x), which Mosaic GPU does not know: what rounding 1 + x lost is made good by the quotient (W. Kahan)."""
    rounded = jax.lax.optimization_barrier(1.0 + x)
    lost = rounded == 1.0
    return jnp.where(lost, x, jnp.log(rounded) * (x / jnp.where(lost, 1.0, rounded - 1.0)))


def _logits(hidden_ref, head_ref, i, v, D: int, tile: SampleBlocks) -> jax.Array:
    """The logits of the tile: hidden @ head.T in steps of `depth`, each copied while earlier ones are multiplied."""

    def compute(sums):
        plgpu.emit_pipeline(
            lambda _, hidden, head: multiply_add(sums, hidden, head, transposed=True),
            grid=(D // tile.depth,),
            in_specs=[
                plgpu.BlockSpec((tile.rows, tile.depth), lambda d: (i, d), transforms=SWIZZLED, delay_release=1),
                plgpu.BlockSpec((tile.columns, tile.depth), lambda d: (v, d), transforms=SWIZZLED, delay_release=1),
            ],
            max_concurrent_steps=_COPIES,
        )(hidden_ref, head_ref)
        return sums[...]

    return pl.run_scoped(compute, plgpu.ACC((tile.rows, tile.columns), jnp.float32))


def _body(V: int, tile: SampleBlocks, mapped: bool, confidence: bool, hidden_ref, head_ref, *refs):
    offset_ref, sampled_ref, *refs = refs
    first_ref, second_ref, temperature_ref, threshold_ref, *refs = refs
    if mapped:
        token_ids_ref, *refs = refs
    score_ref, column_ref, *softmax_refs = refs
    v, i = jax.lax.axis_index("columns"), jax.lax.axis_index("rows")
    rows = pl.ds(i * tile.rows, tile.rows)
    logits = _logits(hidden_ref, head_ref, i, v, hidden_ref.shape[1], tile)
    by_row = [load(ref, (rows,), BY_ROW) for ref in (first_ref, second_ref, temperature_ref, threshold_ref)]
    parts = tile.columns // _COLUMNS
    for part in range(parts):
        at = v * parts + part
        x = logits[:, part * _COLUMNS : (part + 1) * _COLUMNS]
        column = at * _COLUMNS + index(x.shape, 1)
        x = jnp.where(column < V, x, -jnp.inf)

        def noisy(x=x, column=column, at=at):
            token = column + offset_ref[0]
            if mapped:
                ids = load(token_ids_ref, (pl.ds(at * _COLUMNS, _COLUMNS),), BY_COLUMN)
                token = jax.lax.broadcast_in_dim(ids, x.shape, (1,))
            return tiles.perturb(x, token, *(across(of_row, x.shape) for of_row in by_row), log1p=_log1p)

        z = jax.lax.cond(sampled_ref[i] != 0, noisy, lambda x=x: x)
        score_ref[at, rows], column_ref[at, rows] = tiles.tile_winner(z, column)
        if confidence:
            top_ref, mass_ref = softmax_refs
            top_ref[at, rows], mass_ref[at, rows] = tiles.tile_softmax(x)


def best(
    hidden, x, rows: SampledRows, token_ids, offset, *, confidence: bool, blocks: SampleBlocks, interpret: bool
) -> Best:
    """As `sampling.tpu.best`, of hidden states alone; D is a multiple of `depth`."""
    R, V = len(hidden), len(x)
    row_tiles, column_tiles = pl.cdiv(R, blocks.rows), pl.cdiv(V, blocks.columns)
    pad = lambda a, tiles, size: jnp.pad(a, (0, tiles * size - len(a)))
    keys, numbers = tiles.row_operands(rows)
    by_row = [pad(a, row_tiles, blocks.rows) for a in (keys[:, 0], keys[:, 1], numbers[:, 0], numbers[:, 1])]
    mapped = [] if token_ids is None else [pad(token_ids.astype(jnp.int32), column_tiles, blocks.columns)]
    parts = column_tiles * blocks.columns // _COLUMNS
    out = [jax.ShapeDtypeStruct((parts, row_tiles * blocks.rows), d) for d in (jnp.float32, jnp.int32)]
    score, column, *softmax = call(
        functools.partial(_body, V, blocks, token_ids is not None, confidence),
        name="sample_hidden",
        grid=dict(columns=column_tiles, rows=row_tiles),
        out_type=out + out[:1] * 2 * confidence,
        scratch=[],
    )(hidden, x, jnp.reshape(offset, (1,)), rows.tile_samples(blocks.rows), *by_row, *mapped)
    best = tiles.best_of_tiles(score, column, Softmax(*softmax) if confidence else None)
    return jax.tree.map(lambda of_tiles: of_tiles[:R], best)
