"""Grouped RMS norm fused with the downsampling product, on CUDA.

Only the forward is a kernel. The backward is two large plain products and a row-wise sum: cuBLAS runs the products, XLA
fuses the rest, and the normalised hooks are recomputed instead of saved.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.product.api import matmul
from pallas_kernels.triton import call, dot, load, power_of_two, store
from pallas_kernels.tuning import NormBlocks


def _body(rows: int, columns: int, D: int, tile: NormBlocks, epsilon: float, x_ref, scale_ref, kernel_ref, out_ref):
    i, e = pl.program_id(0), pl.program_id(1)
    in_rows = i * tile.rows + jax.lax.broadcasted_iota(jnp.int32, (tile.rows, 1), 0) < rows
    in_columns = e * tile.columns + jax.lax.broadcasted_iota(jnp.int32, (1, tile.columns), 1) < columns
    steps = pl.cdiv(D, tile.depth)

    def inside(d, axis):
        shape = (tile.depth, 1) if axis == 0 else (1, tile.depth)
        return d * tile.depth + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < D

    def add_hook(g, acc):
        def chunk(d):
            return load(x_ref.at[g, :, pl.ds(d * tile.depth, tile.depth)], mask=in_rows & inside(d, 1), other=0.0)

        def add_square(d, total):
            x = chunk(d).astype(jnp.float32)
            return total + jnp.sum(x * x, axis=1)

        def add_product(d, acc):
            at = pl.ds(d * tile.depth, tile.depth)
            scale = load(scale_ref.at[g, at], mask=inside(d, 1).reshape(tile.depth), other=0.0)[None]
            normed = (chunk(d).astype(jnp.float32) * inverse_rms * scale.astype(jnp.float32)).astype(x_ref.dtype)
            weights = load(kernel_ref.at[g, at, :], mask=inside(d, 0) & in_columns, other=0.0)
            return acc + dot(normed, weights)

        mean = jax.lax.fori_loop(0, steps, add_square, jnp.zeros(tile.rows, jnp.float32)) / D
        inverse_rms = jax.lax.rsqrt(mean + epsilon)[:, None]
        return jax.lax.fori_loop(0, steps, add_product, acc)

    acc = jax.lax.fori_loop(0, x_ref.shape[0], add_hook, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    store(out_ref, acc.astype(out_ref.dtype), mask=in_rows & in_columns)


def forward(x, scale, kernel, *, epsilon: float, blocks: NormBlocks, interpret: bool) -> jax.Array:
    """As `norm.tpu.forward`."""
    G, rows, D = x.shape
    columns = kernel.shape[2]
    tile = NormBlocks(min(power_of_two(rows), blocks.rows), blocks.columns, blocks.depth)
    padded_D = pl.cdiv(D, tile.depth) * tile.depth
    (out,) = call(
        functools.partial(_body, rows, columns, D, tile, epsilon),
        name="grouped_rms_norm_downsample",
        grid=(pl.cdiv(rows, tile.rows), pl.cdiv(columns, tile.columns)),
        in_specs=[
            pl.BlockSpec((G, tile.rows, padded_D), lambda i, e: (0, i, 0)),
            pl.BlockSpec((G, padded_D), lambda i, e: (0, 0)),
            pl.BlockSpec((G, padded_D, tile.columns), lambda i, e: (0, 0, e)),
        ],
        out_specs=[pl.BlockSpec((tile.rows, tile.columns), lambda i, e: (i, e))],
        out_shape=[jax.ShapeDtypeStruct((rows, columns), x.dtype)],
        warps=4,
        interpret=interpret,
    )(x, scale, kernel)
    return out


def backward(x, scale, kernel, dout, *, epsilon: float, blocks: NormBlocks, interpret: bool):
    """As `norm.tpu.backward`, but through XLA."""
    del blocks, interpret

    def plain(x, scale, kernel):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon) * scale[:, None].astype(jnp.float32)
        return matmul(y.astype(x.dtype).transpose(1, 0, 2), kernel, axes=2)

    # A float32 kernel, which the product casts, has a float32 gradient.
    return jax.vjp(plain, x, scale, kernel.astype(jnp.float32))[1](dout)
