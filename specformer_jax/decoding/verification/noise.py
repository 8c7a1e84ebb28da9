"""Noise of a request beside the target's own: every pass draws anew, and no draw tells of another."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from pallas_kernels import gumbel
from pallas_kernels.noise import mix
from specformer_jax.config import LARGEST_DRAFT

DRAFTS, ACCEPTANCE, REST = 1, 2, 3  # what is drawn: the drafts, how many are accepted, the token after them


def stream(seed: UInt32[Array, "*shape"], number: int) -> UInt32[Array, "*shape"]:
    """The seed of one of a request's streams of noise; the target's own is the seed itself."""
    return mix(seed ^ mix(jnp.uint32(number)))


def slot_positions(position: Int32[Array, "*#shape"], slot: Int32[Array, "*#shape"]) -> Int32[Array, "*shape"]:
    """Where in a stream a slot draws, of the pass that begins at a position: no other pass begins there."""
    return position * LARGEST_DRAFT + slot


def uniform(seed: UInt32[Array, "*#shape"], position: Int32[Array, "*#shape"]) -> Float32[Array, "*shape"]:
    """From 0 to 1."""
    return jnp.exp(-jnp.exp(-gumbel(seed, position, jnp.int32(0))))
