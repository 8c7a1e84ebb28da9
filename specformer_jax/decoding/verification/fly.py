"""FLy (Li et al., arXiv 2511.22972): a loose verification, which changes answers.

A draft that is not the target's own token passes all the same where two things hold: the target could well have said
something else, which its entropy tells, and the drafts behind it are again what the target says once it has read this
one. Otherwise the chain ends there, as in exact verification.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

COUNTED = 3  # likeliest tokens whose entropy is taken, as in the authors' code


def entropy_of_likeliest(probabilities: Float32[Array, "R V"]) -> Float32[Array, " R"]:
    """The entropy, in nats, as far as the `COUNTED` likeliest tokens make it up."""
    likeliest = jax.lax.top_k(probabilities, min(COUNTED, probabilities.shape[1]))[0]
    return -jnp.where(likeliest > 0, likeliest * jnp.log(jnp.where(likeliest > 0, likeliest, 1.0)), 0.0).sum(axis=1)


def loosely_accepted(
    right: Bool[Array, "B k"], entropy: Float32[Array, "B k"], count: Int32[Array, " B"], *, window: int, least: float
) -> Int32[Array, " B"]:
    """How many drafts of each row are accepted.

    Args:
      right: whether each draft is the target's own token.
      entropy: of the target, where it chose that token.
      count: how many drafts there are.
      window: static, how many drafts behind a wrong one must be there and right; k - 1 where that is fewer.
      least: static, the entropy that lets a wrong one pass.
    """
    k = right.shape[1]
    index, window = jnp.arange(k), min(window, k - 1)
    if window < 1:  # nothing could vouch for a wrong draft
        passes = right
    else:
        behind = jnp.pad(right & (index < count[:, None]), ((0, 0), (0, window)))
        vouched = jnp.stack([behind[:, 1 + i : 1 + i + k] for i in range(window)]).all(axis=0)
        passes = right | (vouched & (entropy >= least))
    passes &= index < count[:, None]
    return jnp.cumprod(passes.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
