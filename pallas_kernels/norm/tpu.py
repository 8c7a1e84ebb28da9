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

from pallas_kernels.mosaic import cost, dot, params
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


def _dx_body(epsilon, rows, x_ref, scale_ref, kernel_ref, dout_ref, dx_ref, dscale_ref, dn_ref):
    i, e = pl.program_id(0), pl.program_id(2)

    @pl.when(e == 0)
    def _():
        dn_ref[...] = jnp.zeros_like(dn_ref)

    dn_ref[...] += dot(dout_ref[...], kernel_ref[...], (1, 1))

    @pl.when(e == pl.num_programs(2) - 1)
    def _():
        x, dn = _real_rows(x_ref[...], i, rows).astype(jnp.float32), _real_rows(dn_ref[...], i, rows)
        r = _inverse_rms(x, epsilon)
        u = dn * scale_ref[...].astype(jnp.float32)
        dx_ref[...] = (r * (u - x * (r * r) * jnp.mean(u * x, axis=1, keepdims=True))).astype(dx_ref.dtype)
        dscale_ref[...] = jnp.sum(dn * x * r, axis=0, keepdims=True)


def _dkernel_body(epsilon, rows, x_ref, scale_ref, dout_ref, dkernel_ref):
    i = pl.program_id(2)

    @pl.when(i == 0)
    def _():
        dkernel_ref[...] = jnp.zeros_like(dkernel_ref)

    x = _real_rows(x_ref[...], i, rows).astype(jnp.float32)
    n = (x * _inverse_rms(x, epsilon) * scale_ref[...].astype(jnp.float32)).astype(x_ref.dtype)
    dkernel_ref[...] += dot(n, _real_rows(dout_ref[...], i, rows), (0, 0))


def _tile(x, kernel, blocks: NormBlocks, held: int) -> tuple[int, int]:
    """Rows and columns of a tile; of the rows a few float32 copies are held at once, each of at most `held` numbers."""
    _, rows, D = x.shape
    columns, fits = kernel.shape[2], 4 * 2**20 // (D * kernel.dtype.itemsize)
    tile_rows = min(rows, blocks.rows, max(16, held // D // 16 * 16))
    return tile_rows, min(columns, blocks.columns, max(128, fits // 128 * 128))


def forward(x, scale, kernel, *, epsilon: float, blocks: NormBlocks, interpret: bool) -> jax.Array:
    """The downsampled rows [rows, columns] of x [G, rows, D]; the kernel [G, D, columns] has the dtype of x."""
    G, rows, D = x.shape
    columns = kernel.shape[2]
    tile_rows, tile_columns = _tile(x, kernel, blocks, held=2**21)
    out_shape = jax.ShapeDtypeStruct((rows, columns), x.dtype)
    return pl.pallas_call(
        functools.partial(_forward_body, epsilon),
        out_shape=out_shape,
        grid=(pl.cdiv(rows, tile_rows), pl.cdiv(columns, tile_columns), G),
        in_specs=[
            pl.BlockSpec((None, tile_rows, D), lambda i, e, g: (g, i, 0)),
            pl.BlockSpec((None, 1, D), lambda i, e, g: (g, 0, 0)),
            pl.BlockSpec((None, D, tile_columns), lambda i, e, g: (g, 0, e)),
        ],
        out_specs=pl.BlockSpec((tile_rows, tile_columns), lambda i, e, g: (i, e)),
        scratch_shapes=[pltpu.VMEM((tile_rows, tile_columns), jnp.float32)],
        compiler_params=params("parallel", "parallel", "arbitrary"),
        cost_estimate=cost([x, scale, kernel], [out_shape], 2 * G * rows * D * columns),
        interpret=interpret,
        name="grouped_rms_norm_downsample",
    )(x, scale[:, None], kernel)


def backward(x, scale, kernel, dout, *, epsilon: float, blocks: NormBlocks, interpret: bool):
    """The gradients of x, scale and kernel, the latter two in float32."""
    G, rows, D = x.shape
    columns = kernel.shape[2]
    tile_rows, tile_columns = _tile(x, kernel, blocks, held=2**20)
    row_tiles, flops = pl.cdiv(rows, tile_rows), 2 * G * rows * D * columns
    # Columns are summed over in the first pass, so its last tile must not read past the array.
    missing = -columns % tile_columns
    whole_kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, missing))) if missing else kernel
    whole_dout = jnp.pad(dout, ((0, 0), (0, missing))) if missing else dout
    dx, dscale = pl.pallas_call(
        functools.partial(_dx_body, epsilon, rows),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((row_tiles, G, 1, D), jnp.float32)],
        grid=(row_tiles, G, pl.cdiv(columns, tile_columns)),
        in_specs=[
            pl.BlockSpec((None, tile_rows, D), lambda i, g, e: (g, i, 0)),
            pl.BlockSpec((None, 1, D), lambda i, g, e: (g, 0, 0)),
            pl.BlockSpec((None, D, tile_columns), lambda i, g, e: (g, 0, e)),
            pl.BlockSpec((tile_rows, tile_columns), lambda i, g, e: (i, e)),
        ],
        out_specs=[
            pl.BlockSpec((None, tile_rows, D), lambda i, g, e: (g, i, 0)),
            pl.BlockSpec((None, None, 1, D), lambda i, g, e: (i, g, 0, 0)),
        ],
        scratch_shapes=[pltpu.VMEM((tile_rows, D), jnp.float32)],
        compiler_params=params("parallel", "parallel", "arbitrary"),
        cost_estimate=cost([x, scale, kernel, dout], [x, scale], flops),
        interpret=interpret,
        name="grouped_rms_norm_downsample_dx",
    )(x, scale[:, None], whole_kernel, whole_dout)
    dkernel_shape = jax.ShapeDtypeStruct(kernel.shape, jnp.float32)
    dkernel = pl.pallas_call(
        functools.partial(_dkernel_body, epsilon, rows),
        out_shape=dkernel_shape,
        grid=(G, pl.cdiv(columns, tile_columns), row_tiles),
        in_specs=[
            pl.BlockSpec((None, tile_rows, D), lambda g, e, i: (g, i, 0)),
            pl.BlockSpec((None, 1, D), lambda g, e, i: (g, 0, 0)),
            pl.BlockSpec((tile_rows, tile_columns), lambda g, e, i: (i, e)),
        ],
        out_specs=pl.BlockSpec((None, D, tile_columns), lambda g, e, i: (g, 0, e)),
        compiler_params=params("parallel", "parallel", "arbitrary"),
        cost_estimate=cost([x, scale, dout], [dkernel_shape], flops),
        interpret=interpret,
        name="grouped_rms_norm_downsample_dkernel",
    )(x, scale[:, None], dout)
    return dx, dscale.sum(axis=0)[:, 0], dkernel
