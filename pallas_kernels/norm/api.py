"""RMS norm, and the grouped one fused with the downsampling product: how SpecFormer's head reads the target's hooks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch, tuning
from pallas_kernels.dispatch import Choice, Implementation
from pallas_kernels.norm import cpu, reference
from pallas_kernels.product.api import matmul
from pallas_kernels.product.cpu import PackedMatrix

NO_KERNEL = "XLA fuses a lone norm by itself"


def rms_norm(
    x: Float[Array, "*batch D"],
    scale: Float[Array, "*groups D"],
    *,
    epsilon: float,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch D"]:
    """x / sqrt(mean of x^2 + epsilon) * scale over the last axis.

    Statistics in float32; the quotient is rounded to the dtype of x, and so is its product with the scale. By the
    native body a row's result is the same bits whatever else is in the batch. Differentiable: the reference runs then.

    Args:
      x: what is normed.
      scale: one a channel, or [G, D] where the last axes of x are those; cast to the dtype of x, its gradient keeps its
        own.
      epsilon: what is added to the mean square.
      implementation: None, "xla" or "native"; see `dispatch`. None takes the native body for bfloat16 alone.

    Returns:
      The norm, in the dtype of x.

    Raises:
      NotImplementedError: "native" was named and cannot run; it says why.
    """
    choice = dispatch.why(implementation, unsupported=NO_KERNEL, no_native=_no_native(x, implementation))
    if choice.implementation == "native":
        return cpu.rms_norm(x, scale, epsilon)
    return reference.rms_norm(x, scale, epsilon=epsilon)


def _no_native(x: jax.Array, implementation: Implementation | None) -> str | None:
    """Why the native body does not norm this array; None where it does."""
    if implementation is None and x.dtype == jnp.float32:
        return "in float32 the products are XLA's, too"  # no row-invariance to win, and training stays as it is
    return cpu.no_native_body(x)


def grouped_rms_norm_downsample(
    hooks: Float[Array, "*lead G D"],
    scale: Float[Array, "G D"],
    kernel: Float[Array, "G D columns"] | PackedMatrix,
    *,
    epsilon: float,
    implementation: Implementation | None = None,
) -> Float[Array, "*lead columns"]:
    """sum over g of RMSNorm_g(hooks[.., g, :]) @ kernel[g] (paper section 3.2, hook -> grouped norm -> downsample).

    Norm statistics in float32, the product in the input's dtype with float32 accumulation. Differentiable. The native
    body rounds the norm once more, before its scale, as `rms_norm` does.

    Args:
      hooks: the hidden states of G layers of the target, at any number of token positions.
      scale: the norm's scale, which each hook has for itself.
      kernel: the downsampling product without a bias; cast to the dtype of hooks, its gradient keeps its own.
      epsilon: what is added to the mean square.
      implementation: None, "pallas", "xla" or "native"; see `dispatch`. None takes the native body for bfloat16 alone.

    Returns:
      What the head reads at each position, in the dtype of hooks.

    Raises:
      ValueError: shapes that do not fit together.
    """
    if hooks.shape[-2:] != scale.shape or kernel.shape[:2] != scale.shape:
        raise ValueError(f"hooks {hooks.shape}, scale {scale.shape} and kernel {kernel.shape} must share [G, D]")
    choice = dispatch.why(implementation, no_native=_no_native(hooks, implementation))
    if choice.implementation == "native":
        return matmul(cpu.rms_norm(hooks, scale, epsilon), kernel, axes=2)
    if choice.implementation == "xla":
        return reference.downsample(hooks, scale, kernel, epsilon=epsilon)
    # A hook at a time is a tile: [G, rows, D]. XLA folds this into the stacking of the hooks.
    x = hooks.reshape(-1, *scale.shape).transpose(1, 0, 2)
    out = _downsample(choice, epsilon, x, scale, kernel)
    return out.reshape(*hooks.shape[:-2], kernel.shape[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _downsample(
    choice: Choice,
    epsilon: float,
    x: Float[Array, "G rows D"],
    scale: Float[Array, "G D"],
    kernel: Float[Array, "G D columns"],
) -> Float[Array, "rows columns"]:
    return _body(choice).forward(x, scale, kernel.astype(x.dtype), **_how(choice, epsilon, x))


def _downsample_forward(choice, epsilon, x, scale, kernel):
    return _downsample(choice, epsilon, x, scale, kernel), (x, scale, kernel)


def _downsample_backward(choice, epsilon, saved, dout):
    x, scale, kernel = saved
    how = _how(choice, epsilon, x)
    dx, dscale, dkernel = _body(choice).backward(x, scale, kernel.astype(x.dtype), dout, **how)
    return dx, dscale.astype(scale.dtype), dkernel.astype(kernel.dtype)


_downsample.defvjp(_downsample_forward, _downsample_backward)


def _how(choice: Choice, epsilon: float, x: jax.Array) -> dict:
    size = tuning.pick(tuning.NormBlocks, choice.platform, x.dtype, x.shape[1])
    return dict(epsilon=epsilon, blocks=size, interpret=choice.interpret)


def _body(choice: Choice):
    """The kernel bodies of a platform, imported when first used."""
    if choice.platform == "cuda":
        from pallas_kernels.norm import gpu as body
    else:
        from pallas_kernels.norm import tpu as body
    return body
