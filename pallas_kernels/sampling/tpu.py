"""Sampling on TPU: vocabulary tiles stream past a running winner, from logits or straight from the LM head."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu_forward import VMEM_LIMIT, cost, dot
from pallas_kernels.sampling.tile import Best, perturb, row_operands, tile_winner
from pallas_kernels.tuning import SampleBlocks

_HEAD_TILE = 4 * 2**20  # bytes of the LM-head matrix in flight, twice


def _body(V: int, bv: int, fused: bool, mapped: bool, with_logprob: bool, *refs):
    refs = iter(refs)
    offset_ref, sampled_ref = next(refs), next(refs)
    hidden_ref = next(refs) if fused else None
    x_ref, keys_ref, params_ref = next(refs), next(refs), next(refs)
    ids_ref = next(refs) if mapped else None
    score_ref, column_ref = next(refs), next(refs)
    raw_ref, lse_ref, top_ref, total_ref = refs if with_logprob else (None,) * 4

    i, v = pl.program_id(0), pl.program_id(1)

    @pl.when(v == 0)
    def _():
        score_ref[...] = jnp.full_like(score_ref, -jnp.inf)
        column_ref[...] = jnp.zeros_like(column_ref)
        if with_logprob:
            top_ref[...] = jnp.full_like(top_ref, -1e30)
            total_ref[...] = jnp.zeros_like(total_ref)

    x = dot(hidden_ref[...], x_ref[...], (1, 1)) if fused else x_ref[...].astype(jnp.float32)
    column = v * bv + jax.lax.broadcasted_iota(jnp.int32, (1, bv), 1)
    x = jnp.where(column < V, x, -jnp.inf)  # the last tile reads past the vocabulary

    if with_logprob:

        @pl.when(v == 0)
        def _():
            raw_ref[...] = x[:, :1]  # column 0 stands where every token is ruled out

    def absorb(z):
        score, winner = tile_winner(z, column)
        better = score[:, None] > score_ref[...]  # strictly: the earlier tile wins ties
        if with_logprob:
            raw = jnp.sum(jnp.where(column == winner[:, None], x, 0.0), axis=1, keepdims=True)
            raw_ref[...] = jnp.where(better, raw, raw_ref[...])
        score_ref[...] = jnp.where(better, score[:, None], score_ref[...])
        column_ref[...] = jnp.where(better, winner[:, None], column_ref[...])

    @pl.when(sampled_ref[i] == 0)
    def _():
        absorb(x)  # all rows of the tile are greedy: no noise to draw

    @pl.when(sampled_ref[i] != 0)
    def _():
        token = ids_ref[...] if mapped else column + offset_ref[0]
        keys, params = keys_ref[...], params_ref[...]
        absorb(perturb(x, token, keys[:, :1], keys[:, 1:], params[:, :1], params[:, 1:]))

    if with_logprob:
        top = jnp.maximum(top_ref[...], x.max(axis=1, keepdims=True))
        total = total_ref[...] * jnp.exp(top_ref[...] - top) + jnp.exp(x - top).sum(axis=1, keepdims=True)
        top_ref[...], total_ref[...] = top, total

        @pl.when(v == pl.num_programs(1) - 1)
        def _():
            lse_ref[...] = top + jnp.log(total)


def best(
    hidden: jax.Array | None,
    x: jax.Array,
    *,
    seed,
    position,
    temperature,
    threshold,
    token_ids,
    offset,
    with_logprob: bool,
    blocks: SampleBlocks,
    interpret: bool,
) -> Best:
    """The winner of each row.

    Args:
      hidden: f[R, D] and x the LM head f[V, D], or None and x the logits f[R, V].
      token_ids: None or i32[V].
      offset: i32[], the token of column 0 where there are no token_ids.
      Others as `sample_logits`.
    """
    fused = hidden is not None
    R, V = (hidden.shape[0], x.shape[0]) if fused else x.shape
    br, bv = min(R, blocks.rows), blocks.columns
    if fused:
        fits = _HEAD_TILE // (x.shape[1] * x.dtype.itemsize)
        bv = min(bv, max(128, fits // 128 * 128))
    bv = min(bv, V)
    nr, nv = pl.cdiv(R, br), pl.cdiv(V, bv)
    keys, params = row_operands(seed, position, temperature, threshold)
    sampled = jnp.pad(temperature > 0, (0, nr * br - R)).reshape(nr, br).any(axis=1).astype(jnp.int32)

    row = lambda n: pl.BlockSpec((br, n), lambda i, v, *_: (i, 0))
    operands, in_specs = [], []
    if fused:
        operands += [hidden, x]
        in_specs += [row(x.shape[1]), pl.BlockSpec((bv, x.shape[1]), lambda i, v, *_: (v, 0))]
    else:
        operands += [x]
        in_specs += [pl.BlockSpec((br, bv), lambda i, v, *_: (i, v))]
    operands += [keys, params]
    in_specs += [row(2), row(2)]
    if token_ids is not None:
        operands += [token_ids[None]]
        in_specs += [pl.BlockSpec((1, bv), lambda i, v, *_: (0, v))]
    dtypes = [jnp.float32, jnp.int32] + [jnp.float32] * 2 * with_logprob
    out_shape = [jax.ShapeDtypeStruct((R, 1), d) for d in dtypes]
    out = pl.pallas_call(
        functools.partial(_body, V, bv, fused, token_ids is not None, with_logprob),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(nr, nv),
            in_specs=in_specs,
            out_specs=[row(1)] * len(dtypes),
            scratch_shapes=[pltpu.VMEM((br, 1), jnp.float32)] * 2 * with_logprob,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=cost(operands, out_shape, 2 * R * V * (x.shape[1] if fused else 1), 2 * R * V),
        interpret=interpret,
        name="sample_hidden" if fused else "sample_logits",
    )(jnp.reshape(offset, (1,)), sampled, *operands)
    out = [o[:, 0] for o in out]
    return Best(*out) if with_logprob else Best(*out, None, None)
