"""What the TPU bodies of several ops share: a product of tiles, the compiler's parameters, what a call costs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.product.api import exact

_VMEM_LIMIT = 64 * 2**20  # bytes; every chip that is compiled for has at least this


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of two tiles over one axis each, accumulated in float32; float32 operands are not rounded to bfloat16."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact(a.dtype), preferred_element_type=jnp.float32)


def params(*semantics: str) -> pltpu.CompilerParams:
    """The compiler's parameters; `semantics` says for each grid axis if its steps are "parallel" or in order."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=_VMEM_LIMIT)


def cost(operands, results, flops: int, transcendentals: int = 0) -> pl.CostEstimate:
    """What a call costs, for XLA's scheduler and reports: every operand read once, every result written once."""
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((operands, results)))
    return pl.CostEstimate(flops=flops, bytes_accessed=size, transcendentals=transcendentals)
