"""Grouped RMS norm fused with the downsampling product: how SpecFormer's head reads the target's hooks."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation


def grouped_rms_norm_downsample(
    hooks: jax.Array,
    scale: jax.Array,
    kernel: jax.Array,
    *,
    epsilon: float,
    implementation: Implementation | None = None,
) -> jax.Array:
    """sum over g of RMSNorm_g(hooks[.., g, :]) @ kernel[g] (paper section 3.2, hook -> grouped norm -> downsample).

    Norm statistics in float32, the product in the input's dtype with float32 accumulation. Differentiable.

    Args:
      hooks: f[..., G, D], hidden states of G layers.
      scale: f[G, D], a separate norm scale for each.
      kernel: f[G, D, E], the downsampling product, no bias.
      epsilon: added to the mean square.
      implementation: None, "pallas" or "xla"; see `dispatch`.

    Returns:
      f[..., E] of the dtype of hooks.

    Raises:
      ValueError: shapes that do not fit together.
    """
    if hooks.shape[-2:] != scale.shape or kernel.shape[:2] != scale.shape:
        raise ValueError(f"hooks {hooks.shape}, scale {scale.shape} and kernel {kernel.shape} must share [G, D]")
    dispatch.why(implementation, unsupported="the kernel is not written yet")
    return reference(hooks, scale, kernel, epsilon=epsilon)


def reference(hooks: jax.Array, scale: jax.Array, kernel: jax.Array, *, epsilon: float) -> jax.Array:
    """The specification in jnp; arguments as `grouped_rms_norm_downsample`."""
    G, D, E = kernel.shape
    rows = math.prod(hooks.shape[:-2])
    x = hooks.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale.astype(jnp.float32)
    x = x.astype(hooks.dtype).reshape(rows, G * D)
    # r(gd),(gd)e->re
    out = jnp.einsum("rd,de->re", x, kernel.reshape(G * D, E).astype(x.dtype), preferred_element_type=jnp.float32)
    return out.astype(hooks.dtype).reshape(*hooks.shape[:-2], E)
