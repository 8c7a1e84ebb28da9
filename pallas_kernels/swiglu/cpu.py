"""The gate of an FFN by the native body of a CPU (`pallas_kernels/cpu/swiglu`), for decoding in bfloat16.

It rounds where the reference does; XLA's own code takes several times as long for more than one row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.swiglu import reference


def no_native_body(gate_up: Array) -> str | None:
    """Why the native body cannot take this array, as a phrase; None where it can."""
    return None if gate_up.dtype == jnp.bfloat16 else f"it gates bfloat16, not {gate_up.dtype}"


@jax.custom_jvp
def swiglu(gate_up: Float[Array, "*batch 2 F"]) -> Float[Array, "*batch F"]:
    """The gate; under differentiation the reference runs, value and gradient."""
    *batch, _, F = gate_up.shape
    rows = gate_up.reshape(-1, 2, F)
    out = jax.ShapeDtypeStruct((len(rows), F), jnp.bfloat16)
    return jax.ffi.ffi_call("specformer_swiglu", out, vmap_method="sequential")(rows).reshape(*batch, F)


@swiglu.defjvp
def _differentiated(primals, tangents):
    return jax.jvp(reference.swiglu, primals, tangents)
