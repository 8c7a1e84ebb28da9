"""The matrix product of the model and of the kernels' references, in forms that are fast where it is lowered for."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.product import cpu
from pallas_kernels.product.cpu import PackedMatrix

Array = jax.Array


def matmul(x: Array, kernel: Array | PackedMatrix, axes: int = 1) -> Array:
    """Contracts the last `axes` of x with the first of the kernel, accumulating in float32.

    Args:
      x: f[..., *in], the compute dtype.
      kernel: f[*in, *out], cast to x's dtype; its gradient keeps the kernel's own dtype. Packed weights run natively.

    Returns:
      f[..., *out] in x's dtype.

    Raises:
      NotImplementedError: the kernel is packed and the native body cannot run here; the message is the reason.
    """
    if isinstance(kernel, PackedMatrix):
        return cpu.packed_product(x, kernel, axes)
    # The kernel's outer axes stay apart, so that a mesh which splits one of them finds it in the product.
    return _product(
        x.reshape(*x.shape[: x.ndim - axes], -1), kernel.reshape(math.prod(kernel.shape[:axes]), *kernel.shape[axes:])
    )


def matmul_rows(x: Array, matrix: Array) -> Array:
    """Each x times each row of a matrix, f[R, D], f[V, D] -> f32[R, V], accumulated in float32."""
    other = None if x.dtype == matrix.dtype == jnp.bfloat16 else f"it multiplies bfloat16, not {x.dtype}"
    if dispatch.why(no_native=other).implementation == "native":
        return cpu.product_of_rows(x, matrix)
    R = x.shape[0]
    if R == 1:  # XLA's CPU product of one bfloat16 row takes a slow path, of two rows a fast one
        x = jnp.concatenate([x, x])
    return jnp.einsum("rd,vd->rv", x, matrix, precision=exact(x.dtype), preferred_element_type=jnp.float32)[:R]


def exact(dtype) -> jax.lax.Precision | None:
    """The precision of a product in this dtype: accelerators round float32 to bfloat16 or TF32 unless told not to."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _dot(a: Array, b: Array, dims) -> Array:
    return jax.lax.dot_general(a, b, dims, precision=exact(a.dtype), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    """x f[..., I] @ kernel f[I, *out] -> f[..., *out] in x's dtype."""
    if math.prod(x.shape[:-1]) == 1:
        # A bfloat16 product of one row takes a path ten times slower on CPU than one of two rows.
        lead = x.shape[:-1]
        return _contract(jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0))), kernel)[:1].reshape(*lead, *kernel.shape[1:])
    return _contract(x, kernel)


def _contract(x: Array, kernel: Array) -> Array:
    kernel, parts = kernel.astype(x.dtype), _parts(x)
    if parts == 1:
        whole = (((x.ndim - 1,), (0,)), ((), ()))
        return _dot(x, kernel, whole).astype(x.dtype)
    rows, kernels = x.reshape(-1, parts, x.shape[-1] // parts), kernel.reshape(parts, -1, *kernel.shape[1:])
    by_part = (((2,), (1,)), ((1,), (0,)))
    products = _dot(rows, kernels, by_part)
    return products.sum(axis=0).astype(x.dtype).reshape(*x.shape[:-1], *kernel.shape[1:])


def _parts(x: Array) -> int:
    """Into how many sums a product is split, 1 for none."""
    # A bfloat16 product of few rows takes half as long again on CPU where it sums over more than 768 inputs.
    inputs, rows = x.shape[-1], math.prod(x.shape[:-1])
    if dispatch.platform() != "cpu" or x.dtype != jnp.bfloat16 or rows > 8:
        return 1
    least = -(-inputs // 768)
    return next((parts for parts in range(least, 2 * least) if inputs % parts == 0), 1)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel), (x, kernel)


def _product_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # Left to autodiff these would be float32 x bfloat16 products, which are ten times slower on CPU.
    x, kernel = saved
    lead, out = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, g.ndim))
    over_out = ((out, tuple(range(1, kernel.ndim))), ((), ()))
    d_x = _dot(g, kernel.astype(g.dtype), over_out)
    d_kernel = _dot(x, g, ((lead, lead), ((), ())))
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)
