"""RMS norm by the native body of a CPU (`pallas_kernels/cpu/norm`), for decoding.

A row's sum is one fixed order of operations, so its result is the same bits however many rows there are; XLA's depends
on their number.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.norm import reference


def no_native_body(x: Array) -> str | None:
    """Why the native body cannot take this array, as a phrase; None where it can."""
    return None if x.dtype in ("bfloat16", "float32") else f"it norms bfloat16 or float32, not {x.dtype}"


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, "*groups D"], epsilon: float) -> Float[Array, "*batch D"]:
    """The norm of each row; under differentiation the reference runs, value and gradient."""
    rows = x.reshape(-1, x.shape[-1])
    out = jax.ShapeDtypeStruct(rows.shape, x.dtype)
    call = jax.ffi.ffi_call("specformer_rms_norm", out, vmap_method="sequential")
    return call(rows, scale.reshape(-1, x.shape[-1]).astype(x.dtype), epsilon=np.float32(epsilon)).reshape(x.shape)


@rms_norm.defjvp
def _differentiated(epsilon, primals, tangents):
    return jax.jvp(functools.partial(reference.rms_norm, epsilon=epsilon), primals, tangents)
