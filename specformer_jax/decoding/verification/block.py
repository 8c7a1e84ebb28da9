"""Block verification (Sun et al., arXiv 2403.10444): a chain of drafts is judged as a whole, not token by token.

Drafts x_1 .. x_k are drawn from the drafter's M_s one after the other; the target's M_b are what plain decoding would
draw from. With p_0 = 1, p_i = min(p_{i-1} M_b(x_i) / M_s(x_i), 1) and S_i = sum_x max(p_i M_b(x) - M_s(x), 0), the
distributions after i drafts, the chain is accepted up to the largest i with u_i <= h_i, where
h_i = S_i / (S_i + 1 - p_i), h_k = p_k; the next token is drawn from max(p_i M_b - M_s, 0), or from M_b after all of
them. What is committed is distributed as plain decoding's tokens are, and no rule that looks at one chain accepts more
drafts in the mean. For k = 1 it is token verification.

How many drafts a chain has may depend on the drafts before the place where it ends, not on later ones: the proof goes
through prefix by prefix.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32


class BlockVerdict(NamedTuple):
    """What is committed of a chain.

    Attributes:
      accepted: how many drafts.
      token: the token after them.
    """

    accepted: Int32[Array, ""]
    token: Int32[Array, ""]


class BlockChances(NamedTuple):
    """What decides how far a chain is accepted.

    Attributes:
      weight: p_i, after i drafts.
      chance: h_i; 0 past the chain's end.
    """

    weight: Float32[Array, " 1+k"]
    chance: Float32[Array, " 1+k"]


def block_chances(
    draft: Float32[Array, "k V"],
    target: Float32[Array, "1+k V"],
    tokens: Int32[Array, " k"],
    count: Int32[Array, ""] | int,
    first: Int32[Array, ""] | int = 0,
) -> BlockChances:
    """p_i and h_i of a chain.

    Args:
      draft: M_s after i drafts: what draft i + 1 was drawn from; one-hot for a draft that was certain.
      target: M_b after i drafts.
      tokens: the drafts.
      count: how many of them there are.
      first: how many of them are accepted already: the chain begins there, whatever the target's distribution there.
    """
    k = len(tokens)
    index, slots = jnp.arange(k + 1), jnp.arange(k)
    drawn, wanted = draft[slots, tokens], target[slots, tokens]
    ratio = jnp.where(slots < first, 1.0, jnp.where(drawn > 0, wanted / jnp.where(drawn > 0, drawn, 1.0), 0.0))
    one = jnp.float32(1)
    follow = lambda weight, ratio: (jnp.minimum(weight * ratio, 1.0),) * 2
    weight = jnp.concatenate([one[None], jax.lax.scan(follow, one, ratio)[1]])
    excess = jnp.maximum(weight[:-1, None] * target[:-1] - draft, 0.0).sum(axis=1)
    below = excess + 1 - weight[:-1]
    inner = jnp.where(below > 0, excess / jnp.where(below > 0, below, 1.0), 1.0)
    chance = jnp.where(index < count, jnp.append(inner, 0.0), jnp.where(index == count, weight, 0.0))
    return BlockChances(weight, chance)


def judge_block(
    draft: Float32[Array, "k V"],
    target: Float32[Array, "1+k V"],
    tokens: Int32[Array, " k"],
    count: Int32[Array, ""] | int,
    uniforms: Float32[Array, " k"],
    first: Int32[Array, ""] | int = 0,
) -> tuple[Int32[Array, ""], Float32[Array, " V"]]:
    """How many drafts are accepted, and the distribution of the token after them.

    Args:
      draft, target, tokens, count, first: as in `block_chances`.
      uniforms: u_1 .. u_k, each from 0 to 1.
    """
    weight, chance = block_chances(draft, target, tokens, count, first)
    index = jnp.arange(len(chance))
    passed = (jnp.append(0.0, uniforms) <= chance) & (index <= count) & (index > first)
    accepted = jnp.max(jnp.where(passed, index, first)).astype(jnp.int32)
    own = target[accepted]
    rest = jnp.maximum(weight[accepted] * own - draft[jnp.minimum(accepted, len(tokens) - 1)], 0.0)
    # Where drafter and target agree nothing is left over, and the chain does not end there but for rounding.
    rest = jnp.where((accepted < count) & (rest.sum() > 0), rest, own)
    return accepted, rest / rest.sum()


def verify_block(
    draft: Float32[Array, "k V"],
    target: Float32[Array, "1+k V"],
    tokens: Int32[Array, " k"],
    count: Int32[Array, ""] | int,
    uniforms: Float32[Array, " k"],
    noise: Float32[Array, " V"],
) -> BlockVerdict:
    """Block verification of one chain.

    Args:
      draft, target, tokens, count, uniforms: as in `judge_block`.
      noise: Gumbel noise of each token, which draws the next one.
    """
    accepted, rest = judge_block(draft, target, tokens, count, uniforms)
    return BlockVerdict(accepted, draw(rest, noise))


def draw(distribution: Float32[Array, " V"], noise: Float32[Array, " V"]) -> Int32[Array, ""]:
    """The token that Gumbel noise draws from a distribution."""
    return jnp.argmax(jnp.log(distribution) + noise).astype(jnp.int32)
