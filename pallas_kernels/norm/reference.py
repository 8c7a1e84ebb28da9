"""RMS norm, and the grouped one fused with the downsampling product: in jnp, and what runs where no kernel does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.product.api import matmul
from pallas_kernels.product.cpu import PackedMatrix


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, "*groups D"], *, epsilon: float
) -> Float[Array, "*batch D"]:
    """x / rms(x) * scale over the last axis; arguments as `api.rms_norm`."""
    f32 = x.astype(jnp.float32)
    normed = f32 * jax.lax.rsqrt(jnp.mean(f32 * f32, axis=-1, keepdims=True) + epsilon)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def downsample(
    hooks: Float[Array, "*lead G D"],
    scale: Float[Array, "G D"],
    kernel: Float[Array, "G D columns"] | PackedMatrix,
    *,
    epsilon: float,
) -> Float[Array, "*lead columns"]:
    """The sum over hooks of RMSNorm(hook) @ kernel; arguments as `api.grouped_rms_norm_downsample`."""
    x = hooks.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale.astype(jnp.float32)
    return matmul(x.astype(hooks.dtype), kernel, axes=2)
