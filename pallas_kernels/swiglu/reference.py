"""The gate of an FFN: the specification in jnp."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float


def swiglu(gate_up: Float[Array, "*batch 2 F"]) -> Float[Array, "*batch F"]:
    """silu(gate) * up, each operation in the dtype of its operands."""
    return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
