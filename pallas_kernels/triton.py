"""What the GPU bodies share, and the one place that chooses how kernels reach a CUDA device.

Two ways exist: Triton (compute capability 8.0 and newer) and Mosaic GPU, what a plain `pl.pallas_call` lowers to (9.0
only, and only for bodies written for its memory spaces). The bodies here are Triton's, so that one body serves A100 and
H100. jax 0.11 deprecates Triton and 0.12 still has it: each program that holds such a kernel would warn.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import dispatch

load = triton.load  # masked loads and stores: Triton's tiles are powers of two, arrays are not
store = triton.store


def call(
    body: Callable,
    *,
    name: str,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    warps: int,
    stages: int = 2,
    interpret: bool = False,
) -> Callable:
    """`pl.pallas_call` through Triton; every program of the grid runs in parallel, in no order."""
    # The warning comes later, when the program that is being traced here is lowered: a context could not hold it.
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    return pl.pallas_call(
        body,
        out_shape=tuple(out_shape),
        grid=grid,
        in_specs=list(in_specs),
        out_specs=tuple(out_specs),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of two tiles, accumulated in float32.

    float32 operands go through the tensor cores as three tf32 products, near float32's own accuracy: the exact product
    has no tensor core, and its register tiles spill.
    """
    precision = None
    if a.dtype == jnp.float32:  # a CPU, which simulates, has no tf32
        exact, three = jax.lax.Precision.HIGHEST, jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = exact if dispatch.interpreting() else three
    return jax.lax.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that holds n; a product needs 16."""
    return max(least, 1 << (n - 1).bit_length())
