"""bfloat16 products by the native bodies of a CPU (`pallas_kernels/cpu/product/product.cc`), for decoding.

Weights that are multiplied at every step are packed once, when a model is loaded. Each element of a result is one sum
in a fixed order, so a row's result is the same bits however many rows there are and whatever they hold.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import BFloat16, Float32

from pallas_kernels import cpu, dispatch
from pallas_kernels.product import four_bits

Array = jax.Array

PANEL = 16  # columns that lie side by side
# Sets that expand four bits sooner than memory gives the bfloat16 weights they stand for, where that was measured.
EXPANDS = ("avx512_bf16",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """Weights in the order in which the native product reads them, in place of the plain array among the parameters.

    `matmul` takes it like the plain one; it has no gradient (`unpack` gives the plain array again).

    Attributes:
      panels: the weights, bf16[panels, pairs, 16, 2]: sixteen columns at a time and two inputs side by side, padded
        with zeros; in four bits u8[panels, inputs / 32, 320]; or what JAX puts in the place of an array, as in all
        trees.
      shape: that of the plain array.
      axes: how many of its first axes a product sums over.
    """

    panels: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axes: int = dataclasses.field(metadata={"static": True})


def pack(kernel: np.ndarray, axes: int = 1) -> PackedMatrix:
    """Packs a bfloat16 array on the host; the first `axes` are what a product sums over."""
    inputs, columns = math.prod(kernel.shape[:axes]), math.prod(kernel.shape[axes:])
    words = np.zeros((-(-inputs // 2), -(-columns // PANEL) * PANEL), np.uint32)
    bits = kernel.reshape(inputs, columns).view(np.uint16)
    words[: inputs // 2, :columns] = bits[1::2]  # the second of a pair has the upper half of a word
    words <<= 16
    words[:, :columns] |= bits[0::2]
    panels = np.ascontiguousarray(words.reshape(words.shape[0], -1, PANEL).swapaxes(0, 1))
    placed = jax.device_put(panels.view(kernel.dtype).reshape(*panels.shape, 2))
    return PackedMatrix(placed.block_until_ready(), kernel.shape, axes)


def packs_four_bits() -> bool:
    """Whether products by `pack_four_bits` are faster here than those by the same weights in bfloat16."""
    return cpu.isa() in EXPANDS


def pack_four_bits(blocks: np.ndarray, axes: int = 1) -> PackedMatrix:
    """Packs weights in four bits on the host; products by them have the bits of those by `unpack` of them, packed.

    Args:
      blocks: `four_bits.BLOCK`, finite, of the plain array's shape but for its last input axis, which has one for each
        32 inputs.
      axes: how many of the first axes a product sums over.
    """
    rows, columns = math.prod(blocks.shape[:axes]), math.prod(blocks.shape[axes:])
    placed = jax.device_put(four_bits.panels_of(blocks.reshape(rows, columns), PANEL))
    shape = (*blocks.shape[: axes - 1], blocks.shape[axes - 1] * four_bits.INPUTS, *blocks.shape[axes:])
    return PackedMatrix(placed.block_until_ready(), shape, axes)


def unpack(matrix: PackedMatrix) -> Array:
    """The plain array again, bit for bit."""
    inputs, columns = math.prod(matrix.shape[: matrix.axes]), math.prod(matrix.shape[matrix.axes :])
    if matrix.panels.dtype == jnp.uint8:
        return four_bits.expanded(matrix.panels, PANEL)[:, :columns].reshape(matrix.shape)
    rows = matrix.panels.transpose(1, 3, 0, 2).reshape(-1, matrix.panels.shape[0] * PANEL)
    return rows[:inputs, :columns].reshape(matrix.shape)


def packed_product(x: Array, kernel: PackedMatrix, axes: int) -> Array:
    """`matmul` by packed weights.

    Raises:
      NotImplementedError: the native body cannot run here; the message is the reason.
    """
    other_dtype = None if x.dtype == jnp.bfloat16 else f"it multiplies bfloat16, not {x.dtype}"
    dispatch.why("native", no_native=other_dtype)
    if axes != kernel.axes or x.shape[x.ndim - axes :] != kernel.shape[:axes]:
        raise ValueError(f"x {x.shape} does not fit weights {kernel.shape} packed for sums over {kernel.axes} axes")
    columns = math.prod(kernel.shape[axes:])
    rows = x.reshape(-1, math.prod(kernel.shape[:axes]))
    return _product(rows, kernel.panels, columns).reshape(*x.shape[: x.ndim - axes], *kernel.shape[axes:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, panels: Array, columns: int) -> Array:
    out = jax.ShapeDtypeStruct((x.shape[0], columns), jnp.bfloat16)
    target = "specformer_four_bit_product" if panels.dtype == jnp.uint8 else "specformer_product"
    return jax.ffi.ffi_call(target, out, vmap_method="sequential")(x, panels)


def _no_gradient(*_):
    raise NotImplementedError("packed weights are for decoding and have no gradient: training takes plain arrays")


_product.defvjp(_no_gradient, _no_gradient)


@jax.custom_vjp
def product_of_rows(x: BFloat16[Array, "R D"], matrix: BFloat16[Array, "V D"]) -> Float32[Array, "R V"]:
    """Each x times each row of the matrix, whose rows are packed on the way: one copy serves lookup and product."""
    out = jax.ShapeDtypeStruct((x.shape[0], matrix.shape[0]), jnp.float32)
    return jax.ffi.ffi_call("specformer_product_of_rows", out, vmap_method="sequential")(x, matrix)


def _rows_forward(x, matrix):
    return product_of_rows(x, matrix), (x, matrix)


def _rows_backward(saved, g):
    x, matrix = saved
    return (g @ matrix.astype(g.dtype)).astype(x.dtype), (g.T @ x.astype(g.dtype)).astype(matrix.dtype)


product_of_rows.defvjp(_rows_forward, _rows_backward)
