"""Grouped RMS norm fused with the downsampling product, on TPU.

Per position and hook, D the width: r = 1 / sqrt(mean(x^2) + epsilon), n = x * r * scale; out = sum_g n_g @ kernel_g.
Backward, with dn = dout @ kernel^T and u = dn * scale:
dx = r * (u - x * r^2 * mean(u * x)),  dscale = sum over positions of dn * x * r,  dkernel = n^T @ dout.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu_forward import VMEM_LIMIT, cost, dot
from pallas_kernels.tuning import NormBlocks


def _inverse_rms(x: jax.Array, epsilon: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + epsilon)


def _real_rows(x: jax.Array, tile: jax.Array, rows: int) -> jax.Array:
    """Zeros where the last tile reads past the array: those rows are summed over in the backward."""
    row = tile * x.shape[0] + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    return jnp.where(row < rows, x, 0)


def _forward_body(epsilon, x_ref, scale_ref, kernel_ref, out_ref, acc_ref):
    g = pl.program_id(2)

    @pl.when(g == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    x = x_ref[...].astype(jnp.float32)
    n = (x * _inverse_rms(x, epsilon) * scale_ref[...].astype(jnp.float32)).astype(x_ref.dtype)
    acc_ref[...] += dot(n, kernel_ref[...], (1, 0))

    @pl.when(g == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = acc_ref[...].astype(out_ref.dtype)


def _dx_body(epsilon, M, x_ref, scale_ref, kernel_ref, dout_ref, dx_ref, dscale_ref, dn_ref):
    i, e = pl.program_id(0), pl.program_id(2)

    @pl.when(e == 0)
    def _():
        dn_ref[...] = jnp.zeros_like(dn_ref)

    dn_ref[...] += dot(dout_ref[...], kernel_ref[...], (1, 1))

    @pl.when(e == pl.num_programs(2) - 1)
    def _():
        x, dn = _real_rows(x_ref[...], i, M).astype(jnp.float32), _real_rows(dn_ref[...], i, M)
        r = _inverse_rms(x, epsilon)
        u = dn * scale_ref[...].astype(jnp.float32)
        dx_ref[...] = (r * (u - x * (r * r) * jnp.mean(u * x, axis=1, keepdims=True))).astype(dx_ref.dtype)
        dscale_ref[...] = jnp.sum(dn * x * r, axis=0, keepdims=True)


def _dkernel_body(epsilon, M, x_ref, scale_ref, dout_ref, dkernel_ref):
    i = pl.program_id(2)

    @pl.when(i == 0)
    def _():
        dkernel_ref[...] = jnp.zeros_like(dkernel_ref)

    x = _real_rows(x_ref[...], i, M).astype(jnp.float32)
    n = (x * _inverse_rms(x, epsilon) * scale_ref[...].astype(jnp.float32)).astype(x_ref.dtype)
    dkernel_ref[...] += dot(n, _real_rows(dout_ref[...], i, M), (0, 0))


def _sizes(x, kernel, blocks: NormBlocks) -> tuple[int, int]:
    bm = min(x.shape[1], blocks.rows)
    E, fits = kernel.shape[2], 4 * 2**20 // (kernel.shape[1] * kernel.dtype.itemsize)
    return bm, min(E, blocks.columns, max(128, fits // 128 * 128))


def _params(*semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)


def forward(x, scale, kernel, *, epsilon: float, blocks: NormBlocks, interpret: bool) -> jax.Array:
    """x f[G, M, D], scale f[G, D], kernel f[G, D, E] of the dtype of x -> f[M, E]."""
    G, M, D = x.shape
    E = kernel.shape[2]
    bm, be = _sizes(x, kernel, blocks)
    bm = min(bm, max(16, 2**21 // D // 16 * 16))  # a few float32 copies of the rows are held at once: 8 MB each
    return pl.pallas_call(
        functools.partial(_forward_body, epsilon),
        out_shape=jax.ShapeDtypeStruct((M, E), x.dtype),
        grid=(pl.cdiv(M, bm), pl.cdiv(E, be), G),
        in_specs=[
            pl.BlockSpec((None, bm, D), lambda i, e, g: (g, i, 0)),
            pl.BlockSpec((None, 1, D), lambda i, e, g: (g, 0, 0)),
            pl.BlockSpec((None, D, be), lambda i, e, g: (g, 0, e)),
        ],
        out_specs=pl.BlockSpec((bm, be), lambda i, e, g: (i, e)),
        scratch_shapes=[pltpu.VMEM((bm, be), jnp.float32)],
        compiler_params=_params("parallel", "parallel", "arbitrary"),
        cost_estimate=cost([x, scale, kernel], [jax.ShapeDtypeStruct((M, E), x.dtype)], 2 * G * M * D * E),
        interpret=interpret,
        name="grouped_rms_norm_downsample",
    )(x, scale[:, None], kernel)


def backward(x, scale, kernel, dout, *, epsilon: float, blocks: NormBlocks, interpret: bool):
    """Operands of `forward` and dout f[M, E] -> dx f[G, M, D], dscale f32[G, D], dkernel f32[G, D, E]."""
    G, M, D = x.shape
    E = kernel.shape[2]
    bm, be = _sizes(x, kernel, blocks)
    bm = min(bm, max(16, 2**20 // D // 16 * 16))  # several whole float32 rows are held at once: 4 MB each
    nm = pl.cdiv(M, bm)
    if E % be:  # columns are summed over here, so the last tile must not read past the array
        kernel_, dout_ = jnp.pad(kernel, ((0, 0), (0, 0), (0, -E % be))), jnp.pad(dout, ((0, 0), (0, -E % be)))
    else:
        kernel_, dout_ = kernel, dout
    dx, dscale = pl.pallas_call(
        functools.partial(_dx_body, epsilon, M),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((nm, G, 1, D), jnp.float32)],
        grid=(nm, G, pl.cdiv(E, be)),
        in_specs=[
            pl.BlockSpec((None, bm, D), lambda i, g, e: (g, i, 0)),
            pl.BlockSpec((None, 1, D), lambda i, g, e: (g, 0, 0)),
            pl.BlockSpec((None, D, be), lambda i, g, e: (g, 0, e)),
            pl.BlockSpec((bm, be), lambda i, g, e: (i, e)),
        ],
        out_specs=[
            pl.BlockSpec((None, bm, D), lambda i, g, e: (g, i, 0)),
            pl.BlockSpec((None, None, 1, D), lambda i, g, e: (i, g, 0, 0)),
        ],
        scratch_shapes=[pltpu.VMEM((bm, D), jnp.float32)],
        compiler_params=_params("parallel", "parallel", "arbitrary"),
        cost_estimate=cost([x, scale, kernel, dout], [x, scale], 2 * G * M * D * E),
        interpret=interpret,
        name="grouped_rms_norm_downsample_dx",
    )(x, scale[:, None], kernel_, dout_)
    dkernel = pl.pallas_call(
        functools.partial(_dkernel_body, epsilon, M),
        out_shape=jax.ShapeDtypeStruct(kernel.shape, jnp.float32),
        grid=(G, pl.cdiv(E, be), nm),
        in_specs=[
            pl.BlockSpec((None, bm, D), lambda g, e, i: (g, i, 0)),
            pl.BlockSpec((None, 1, D), lambda g, e, i: (g, 0, 0)),
            pl.BlockSpec((bm, be), lambda g, e, i: (i, e)),
        ],
        out_specs=pl.BlockSpec((None, D, be), lambda g, e, i: (g, 0, e)),
        compiler_params=_params("parallel", "parallel", "arbitrary"),
        cost_estimate=cost([x, scale, dout], [jax.ShapeDtypeStruct(kernel.shape, jnp.float32)], 2 * G * M * D * E),
        interpret=interpret,
        name="grouped_rms_norm_downsample_dkernel",
    )(x, scale[:, None], dout)
    return dx, dscale.sum(axis=0)[:, 0], dkernel
