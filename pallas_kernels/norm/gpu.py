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


def _body(sizes, epsilon: float, x_ref, scale_ref, kernel_ref, out_ref):
    G, M, D, E, bm, be, depth = sizes
    i, e = pl.program_id(0), pl.program_id(1)
    in_rows = i * bm + jax.lax.broadcasted_iota(jnp.int32, (bm, 1), 0) < M
    in_columns = e * be + jax.lax.broadcasted_iota(jnp.int32, (1, be), 1) < E
    steps = pl.cdiv(D, depth)

    def inside(d, axis):
        shape = (depth, 1) if axis == 0 else (1, depth)
        return d * depth + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < D

    def hook(g, acc):
        def chunk(d):
            return load(x_ref.at[g, :, pl.ds(d * depth, depth)], mask=in_rows & inside(d, 1), other=0.0)

        def square(d, total):
            x = chunk(d).astype(jnp.float32)
            return total + jnp.sum(x * x, axis=1)

        def product(d, acc):
            at = pl.ds(d * depth, depth)
            scale = load(scale_ref.at[g, at], mask=inside(d, 1).reshape(depth), other=0.0)[None]
            n = (chunk(d).astype(jnp.float32) * r * scale.astype(jnp.float32)).astype(x_ref.dtype)
            w = load(kernel_ref.at[g, at, :], mask=inside(d, 0) & in_columns, other=0.0)
            return acc + dot(n, w)

        mean = jax.lax.fori_loop(0, steps, square, jnp.zeros(bm, jnp.float32)) / D
        r = jax.lax.rsqrt(mean + epsilon)[:, None]
        return jax.lax.fori_loop(0, steps, product, acc)

    acc = jax.lax.fori_loop(0, G, hook, jnp.zeros((bm, be), jnp.float32))
    store(out_ref, acc.astype(out_ref.dtype), mask=in_rows & in_columns)


def forward(x, scale, kernel, *, epsilon: float, blocks: NormBlocks, interpret: bool) -> jax.Array:
    """As `tpu.norm.forward`."""
    G, M, D = x.shape
    E = kernel.shape[2]
    bm, be, depth = min(power_of_two(M), blocks.rows), blocks.columns, blocks.depth
    Dp = pl.cdiv(D, depth) * depth
    (out,) = call(
        functools.partial(_body, (G, M, D, E, bm, be, depth), epsilon),
        name="grouped_rms_norm_downsample",
        grid=(pl.cdiv(M, bm), pl.cdiv(E, be)),
        in_specs=[
            pl.BlockSpec((G, bm, Dp), lambda i, e: (0, i, 0)),
            pl.BlockSpec((G, Dp), lambda i, e: (0, 0)),
            pl.BlockSpec((G, Dp, be), lambda i, e: (0, 0, e)),
        ],
        out_specs=[pl.BlockSpec((bm, be), lambda i, e: (i, e))],
        out_shape=[jax.ShapeDtypeStruct((M, E), x.dtype)],
        warps=4,
        interpret=interpret,
    )(x, scale, kernel)
    return out


def backward(x, scale, kernel, dout, *, epsilon: float, blocks: NormBlocks, interpret: bool):
    """As `tpu.norm.backward`, but through XLA."""
    del blocks, interpret

    def plain(x, scale, kernel):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon) * scale[:, None].astype(jnp.float32)
        return matmul(y.astype(x.dtype).transpose(1, 0, 2), kernel, axes=2)

    # A float32 kernel, which the product casts, has a float32 gradient.
    return jax.vjp(plain, x, scale, kernel.astype(jnp.float32))[1](dout)
