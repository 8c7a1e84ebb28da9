"""Heads and their rotary positions: the specification in jnp."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

Heads = tuple[Float[Array, "*batch N H"], Float[Array, "*batch K H"], Float[Array, "*batch K H"]]


def split(qkv: Float[Array, "*batch K M H"]) -> Heads:
    """Query, key and value heads: of the M heads beside each other all but two are queries, then come key and value."""
    *batch, K, M, H = qkv.shape
    return qkv[..., :-2, :].reshape(*batch, K * (M - 2), H), qkv[..., -2, :], qkv[..., -1, :]


def rotate(
    x: Float[Array, "*batch N H"], cos: Float32[Array, "*batch H/2"], sin: Float32[Array, "*batch H/2"]
) -> Float[Array, "*batch N H"]:
    """Turns heads by the angles of their positions, pairing channel i with i + H/2."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def split_and_rotate(
    qkv: Float[Array, "*batch K M H"], cos: Float32[Array, "*batch H/2"], sin: Float32[Array, "*batch H/2"]
) -> Heads:
    """The heads, of which queries and keys are turned."""
    q, k, v = split(qkv)
    return rotate(q, cos, sin), rotate(k, cos, sin), v
