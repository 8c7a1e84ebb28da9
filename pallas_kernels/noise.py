"""Position-keyed Gumbel noise: a counter-based hash, so that every implementation draws the same bits anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, UInt32

_LARGEST = 1.0 - 2.0**-24  # the largest float32 below 1


def _u32(value: int) -> jax.Array:
    return jnp.uint32(value)


def mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A bijection whose every input bit flips about half of the output bits ("lowbias32", C. Wellons)."""
    x = x ^ (x >> _u32(16))
    x = x * _u32(0x7FEB352D)
    x = x ^ (x >> _u32(15))
    x = x * _u32(0x846CA68B)
    return x ^ (x >> _u32(16))


def row_keys(
    seed: UInt32[Array, "*#shape"], position: Int[Array, "*#shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """Two keys of a (seed, position): 64 bits, so that no two rows walk the same stream shifted."""
    seed = mix(seed.astype(jnp.uint32) + _u32(0x9E3779B9))
    position = position.astype(jnp.uint32)
    first = mix(seed ^ mix(position + _u32(0x85EBCA6B)))
    second = mix(first + (seed ^ _u32(0xC2B2AE35)) + position * _u32(0x27D4EB2F))
    return first, second


def noise_bits(
    keys: tuple[UInt32[Array, "*#shape"], UInt32[Array, "*#shape"]], token: Int[Array, "*#shape"]
) -> UInt32[Array, "*shape"]:
    """Uniform bits of tokens in rows with these keys."""
    first, second = keys
    return mix(mix(token.astype(jnp.uint32) * _u32(0x9E3779B9) + first) ^ second)


def bits_to_gumbel(bits: UInt32[Array, "*shape"], log1p=jnp.log1p) -> Float32[Array, "*shape"]:
    """Gumbel(0, 1) noise from uniform bits: -log(-log(u)) at u = 1 - v, v = (bits + 1/2) / 2^32.

    Written with log1p(-v), since it is the *upper* tail that wins an argmax: there v is small, and its relative
    resolution is a float's and not 2^-24. v is built from two exact halves, since not every chip converts u32 to f32.
    `log1p` is the chip's, where JAX does not have it there.
    """
    high = (bits >> _u32(8)).astype(jnp.int32).astype(jnp.float32)
    low = (bits & _u32(0xFF)).astype(jnp.int32).astype(jnp.float32)
    v = high * jnp.float32(2.0**-24) + (low + jnp.float32(0.5)) * jnp.float32(2.0**-32)
    v = jnp.minimum(v, jnp.float32(_LARGEST))
    return -jnp.log(-log1p(-v))


def gumbel(
    seed: UInt32[Array, "*#shape"], position: Int[Array, "*#shape"], token: Int[Array, "*#shape"]
) -> Float32[Array, "*shape"]:
    """The noise of one token at one position of one request.

    `argmax_v(logits[v] / temperature + gumbel(seed, n, v))` is a draw from softmax(logits / temperature) (the
    Gumbel-max trick), and a function of the request alone: not of its batch row, of what is read beside it or of the
    device.

    Args:
      seed: the request's seed.
      position: the absolute index of the token that is being sampled.
      token: the token's id in the vocabulary. All three broadcast.
    """
    return bits_to_gumbel(noise_bits(row_keys(seed, position), token))
