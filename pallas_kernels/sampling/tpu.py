"""Sampling on TPU: vocabulary tiles stream past a running winner, from logits or straight from the LM head."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic import cost, dot, params
from pallas_kernels.sampling import tiles
from pallas_kernels.sampling.tiles import Best, SampledRows, SamplingOperands, Softmax
from pallas_kernels.tuning import SampleBlocks

_HEAD_TILE = 4 * 2**20  # bytes of the LM-head matrix in flight, twice


def _body(V: int, offset_ref, sampled_ref, refs: SamplingOperands, score_ref, column_ref, softmax_refs: Softmax | None):
    i, v = pl.program_id(0), pl.program_id(1)

    @pl.when(v == 0)
    def _():
        score_ref[...] = jnp.full_like(score_ref, -jnp.inf)
        column_ref[...] = jnp.zeros_like(column_ref)
        if softmax_refs is not None:
            softmax_refs.top[...] = jnp.full_like(softmax_refs.top, -jnp.inf)
            softmax_refs.mass[...] = jnp.zeros_like(softmax_refs.mass)

    x = refs.x[...].astype(jnp.float32) if refs.hidden is None else dot(refs.hidden[...], refs.x[...], (1, 1))
    tile_columns = x.shape[1]
    column = v * tile_columns + jax.lax.broadcasted_iota(jnp.int32, (1, tile_columns), 1)
    x = jnp.where(column < V, x, -jnp.inf)  # the last tile reads past the vocabulary

    if softmax_refs is not None:
        earlier = softmax_refs.top[...]
        top = jnp.maximum(earlier, jnp.max(x, axis=1, keepdims=True))
        mass = jnp.sum(tiles.exp_from(x, top), axis=1, keepdims=True)
        softmax_refs.mass[...] = softmax_refs.mass[...] * tiles.exp_from(earlier, top) + mass
        softmax_refs.top[...] = top

    def absorb(z):
        score, winner = tiles.tile_winner(z, column)
        better = score[:, None] > score_ref[...]  # strictly: the earlier tile wins ties
        score_ref[...] = jnp.where(better, score[:, None], score_ref[...])
        column_ref[...] = jnp.where(better, winner[:, None], column_ref[...])

    @pl.when(sampled_ref[i] == 0)
    def _():
        absorb(x)  # all rows of the tile are greedy: no noise to draw

    @pl.when(sampled_ref[i] != 0)
    def _():
        token = column + offset_ref[0] if refs.token_ids is None else refs.token_ids[...]
        keys, numbers = (ref[...] for ref in refs.rows)
        absorb(tiles.perturb(x, token, keys[:, :1], keys[:, 1:], numbers[:, :1], numbers[:, 1:]))


def best(
    hidden, x, rows: SampledRows, token_ids, offset, *, confidence: bool, blocks: SampleBlocks, interpret: bool
) -> Best:
    """The winner of each row.

    Args:
      hidden: the hidden states, with the LM head as x; or None, with the logits as x.
      x: the LM head or the logits.
      rows: what decides each row's token besides its logits.
      token_ids: the token of each column, or None for a whole vocabulary.
      offset: the token of column 0 where there are no token_ids.
      confidence: whether the softmax of the logits is wanted too.
      blocks: the sizes of a tile.
      interpret: whether the kernel is simulated.
    """
    R, V = x.shape if hidden is None else (hidden.shape[0], x.shape[0])
    tile_rows, tile_columns = min(R, blocks.rows), blocks.columns
    if hidden is not None:
        fits = _HEAD_TILE // (x.shape[1] * x.dtype.itemsize)
        tile_columns = min(tile_columns, max(128, fits // 128 * 128))
    tile_columns = min(tile_columns, V)

    def by_row(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((tile_rows, columns), lambda i, v, *_: (i, 0))

    operands = SamplingOperands(hidden, x, tiles.row_operands(rows), None if token_ids is None else token_ids[None])
    of_vocabulary = pl.BlockSpec((1, tile_columns), lambda i, v, *_: (0, v))
    if hidden is None:
        of_hidden, of_x = None, pl.BlockSpec((tile_rows, tile_columns), lambda i, v, *_: (i, v))
    else:
        of_hidden, of_x = by_row(x.shape[1]), pl.BlockSpec((tile_columns, x.shape[1]), lambda i, v, *_: (v, 0))
    in_specs = SamplingOperands(of_hidden, of_x, (by_row(2), by_row(2)), None if token_ids is None else of_vocabulary)
    numbers, columns = (jax.ShapeDtypeStruct((R, 1), dtype) for dtype in (jnp.float32, jnp.int32))
    out_shape = [numbers, columns, Softmax(numbers, numbers) if confidence else None]
    exponentials = (2 + confidence) * R * V
    score, column, softmax = pl.pallas_call(
        functools.partial(_body, V),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(R, tile_rows), pl.cdiv(V, tile_columns)),
            in_specs=[in_specs],
            out_specs=jax.tree.map(lambda _: by_row(1), out_shape),
        ),
        compiler_params=params("parallel", "arbitrary"),
        cost_estimate=cost(operands, out_shape, 2 * R * V * (1 if hidden is None else x.shape[1]), exponentials),
        interpret=interpret,
        name="sample_logits" if hidden is None else "sample_hidden",
    )(jnp.reshape(offset, (1,)), rows.tile_samples(tile_rows), operands)
    return jax.tree.map(lambda result: result[:, 0], Best(score, column, softmax))
