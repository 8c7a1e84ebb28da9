"""Heads and their rotary positions by the native body of a CPU (`pallas_kernels/cpu/rotary`), for decoding in bfloat16.

One call takes the place of some eight of XLA's fusions in every layer, each of which a step waits for and a start
compiles.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.rotary import reference


def no_native_body(qkv: Array) -> str | None:
    """Why the native body cannot take this array, as a phrase; None where it can."""
    return None if qkv.dtype == jnp.bfloat16 else f"it rotates bfloat16, not {qkv.dtype}"


@jax.custom_jvp
def split_and_rotate(
    qkv: Float[Array, "*batch K M H"], cos: Float32[Array, "*batch H/2"], sin: Float32[Array, "*batch H/2"]
) -> reference.Heads:
    """The heads, of which queries and keys are turned; under differentiation the reference runs, value and gradient."""
    *batch, K, M, H = qkv.shape
    rows = qkv.reshape(math.prod(batch), K, M, H)
    results = [jax.ShapeDtypeStruct((len(rows), heads, H), jnp.bfloat16) for heads in (K * (M - 2), K, K)]
    call = jax.ffi.ffi_call("specformer_rotary", results, vmap_method="sequential")
    q, k, v = call(rows, cos.reshape(len(rows), H // 2), sin.reshape(len(rows), H // 2))
    return q.reshape(*batch, K * (M - 2), H), k.reshape(*batch, K, H), v.reshape(*batch, K, H)


@split_and_rotate.defjvp
def _differentiated(primals, tangents):
    return jax.jvp(reference.split_and_rotate, primals, tangents)
