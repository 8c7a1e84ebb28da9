"""top-k, top-p and min-p as one raw-logit threshold per row, found without a sort."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32


def order_image(x: Float32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Integers in the order of the floats: a < b exactly when image(a) < image(b). -0.0 counts as 0.0; no NaN."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def image_value(image: Int32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The inverse of `order_image`."""
    return jax.lax.bitcast_convert_type(jnp.where(image < 0, image ^ 0x7FFFFFFF, image), jnp.float32)


def logit_threshold(
    logits: Float[Array, "R V"],
    *,
    temperature: Float[Array, " R"],
    top_k: Int[Array, " R"],
    top_p: Float[Array, " R"],
    min_p: Float[Array, " R"],
) -> Float32[Array, " R"]:
    """The raw logit under which a token is ruled out: those with `logits >= threshold` are kept.

    In the order of transformers' warpers: temperature, then top-k, then top-p (over the probabilities of what top-k
    left, renormalised: the smallest set of largest tokens whose mass reaches p), then min-p (at least min_p times the
    largest probability). Tokens that tie with the last one kept are kept too, where a sort would cut at random.

    Each is a cut of the sorted logits, so their composition is one threshold; and the threshold of a count or a mass
    is found by bisection over the 2^32 floats in order: at most 32 passes, and exact.

    Args:
      logits: raw, before any temperature.
      temperature: greedy rows (0) get -inf, as their argmax needs no threshold.
      top_k: how many tokens are kept; 0 keeps all.
      top_p: what mass is kept, in (0, 1]; 1 keeps all.
      min_p: which part of the largest probability a token must have, in [0, 1]; 0 keeps all.
    """
    sampled = temperature > 0
    use_k = sampled & (top_k > 0) & (top_k < logits.shape[1])
    use_p, use_m = sampled & (top_p < 1), sampled & (min_p > 0)
    off = jnp.full(logits.shape[:1], -jnp.inf, jnp.float32)

    def by_rank():
        image = order_image(logits.astype(jnp.float32))
        reaches = lambda t: jnp.sum(image >= t[:, None], axis=1, dtype=jnp.int32) >= top_k
        return jnp.where(use_k, _largest(reaches, image, use_k), off)

    def by_mass(floor):
        x = logits.astype(jnp.float32)
        top = x.max(axis=1, keepdims=True)
        mass = jnp.exp((x - top) / jnp.where(sampled, temperature, 1.0)[:, None])
        mass = jnp.where(x >= floor[:, None], mass, 0.0)
        goal = top_p * mass.sum(axis=1)
        image = order_image(x)
        reaches = lambda t: jnp.sum(jnp.where(image >= t[:, None], mass, 0.0), axis=1) >= goal
        return jnp.where(use_p, jnp.maximum(floor, _largest(reaches, image, use_p)), floor)

    def by_ratio(floor):
        top = logits.max(axis=1).astype(jnp.float32)
        return jnp.where(use_m, jnp.maximum(floor, top + temperature * jnp.log(jnp.where(use_m, min_p, 1.0))), floor)

    # The passes over the vocabulary are paid only when some row asks for them.
    threshold = jax.lax.cond(use_k.any(), by_rank, lambda: off)
    threshold = jax.lax.cond(use_p.any(), by_mass, lambda floor: floor, threshold)
    return jax.lax.cond(use_m.any(), by_ratio, lambda floor: floor, threshold)


def _largest(reaches: Callable[[jax.Array], jax.Array], image: jax.Array, needed: jax.Array) -> jax.Array:
    """The largest float t of each row with reaches(image(t)); `reaches` is true at the row's minimum, and monotone."""
    low, high = image.min(axis=1), image.max(axis=1)
    low = jnp.where(needed, low, high)  # rows that do not ask are done at once

    def unfinished(bounds):
        low, high = bounds
        return jnp.any(low < high)

    def halve(bounds):
        low, high = bounds
        # Rounded up and free of overflow: low + ceil((high - low) / 2).
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        ok = reaches(middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    low, _ = jax.lax.while_loop(unfinished, halve, (low, high))
    return image_value(low)
