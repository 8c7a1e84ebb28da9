"""What EAGLE-3 and DFlash heads read of the target: hidden states of several layers fused to one vector a position."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import matmul
from specformer_jax.nn import layers


class Fusion(nn.Module):
    """One bias-free product over the hooks side by side, G D -> D; it starts by passing the last hook.

    Attributes:
      epsilon: of the norms before it.
      norm: "none", "each" (RMS norms of their own for the hooks, as EAGLE-3.1 has them) or "all" (one over them side by
        side).
    """

    epsilon: float
    norm: str = "none"

    @nn.compact
    def __call__(self, hooks: Float[Array, "*batch G D"]) -> Float[Array, "*batch D"]:
        def pass_last(key, shape, dtype=jnp.float32):
            return jnp.zeros(shape, dtype).at[-1].set(jnp.eye(shape[1], dtype=dtype))

        groups, width = hooks.shape[-2:]
        init = nn.with_logical_partitioning(pass_last, ("hook", "embed", "embed_out"))
        kernel = layers.weights(self, "kernel", init, (groups, width, width))
        if self.norm == "each":
            norms = [layers.RMSNorm(self.epsilon, name=f"norm_{group}") for group in range(groups)]
            hooks = jnp.stack([norm(hooks[..., group, :]) for group, norm in enumerate(norms)], axis=-2)
        elif self.norm == "all":
            joined = hooks.reshape(*hooks.shape[:-2], groups * width)
            hooks = layers.RMSNorm(self.epsilon, name="norm")(joined).reshape(hooks.shape)
        return matmul(hooks, kernel, axes=2)
