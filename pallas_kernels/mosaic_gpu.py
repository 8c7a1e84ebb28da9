"""What the Mosaic GPU bodies share: products on Hopper's tensor cores, and how a kernel is called.

They are written for compute capability 9.0: a program is one warpgroup (128 threads), its operands are copied to shared
memory by the hardware while it computes, and `wgmma` multiplies them there. That takes bfloat16, as float32 operands
would be rounded to tf32.

A CPU simulates them (`lowering_for("cuda", interpret=True)`) by JAX's own simulator, memory by memory and barrier by
barrier. It knows no layouts and no transposed operands: both are dealt with here alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch

MATRIX = plgpu.Layout.WGMMA  # how the threads hold a result of `wgmma`
BY_ROW, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)  # and one number of each of its rows, or of its columns
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # how `wgmma` reads bfloat16 operands

_WHOLE = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # an index that jax 0.10 asks for


def call(body: Callable, *, name: str, grid: dict[str, int], out_type: list, scratch: list) -> Callable:
    """`plgpu.kernel` of one warpgroup a program; `body` finds its place by `jax.lax.axis_index` of the grid's names."""
    simulator = None
    if dispatch.interpreting():
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        simulator = InterpretGPUParams(out_of_bounds_reads="uninitialized")  # NaN, where a GPU reads zeros
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=name,
        interpret=simulator,
    )


def operand(*shape: int) -> plgpu.SMEM:
    """Shared memory for operands of products; the last axis is a multiple of 64."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)


def laid_out(x: jax.Array, layout) -> jax.Array:
    """x, held by the threads in this layout."""
    return x if dispatch.interpreting() else plgpu.layout_cast(x, layout)


def load(ref, at, layout) -> jax.Array:
    """What stands in memory, held by the threads in this layout."""
    if dispatch.interpreting():
        return ref[at]
    return plgpu.load(ref.at[at], *_WHOLE, layout=layout, optimized=False)


def index(shape: tuple[int, int], axis: int) -> jax.Array:
    """The number of each element's row (axis 0) or column (axis 1)."""
    return laid_out(jax.lax.broadcasted_iota(jnp.int32, shape, axis), MATRIX)


def across(by_row: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The number of each row in all of its columns."""
    return jax.lax.broadcast_in_dim(by_row, shape, (0,))


def multiply_add(sums, a, b, *, transposed: bool = False) -> None:
    """sums += a @ b, or a @ b.T; operands in shared memory. The last product may still run when this returns."""
    if not transposed:
        plgpu.wgmma(sums, a, b)
    elif dispatch.interpreting():

        def turned(b_T):
            b_T[...] = b[...].T
            plgpu.wgmma(sums, a, b_T)

        pl.run_scoped(turned, plgpu.SMEM(b.shape[::-1], b.dtype))
    else:
        plgpu.wgmma(sums, a, b.transpose((1, 0)))


def product(a, b, *, transposed: bool = False) -> jax.Array:
    """a @ b, or a @ b.T, in float32; operands in shared memory, which are free again when this returns."""

    def compute(sums):
        multiply_add(sums, a, b, transposed=transposed)
        return sums[...]

    columns = b.shape[0 if transposed else 1]
    return pl.run_scoped(compute, plgpu.ACC((a.shape[0], columns), jnp.float32))
