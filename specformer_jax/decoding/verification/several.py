"""Several i.i.d. chains of a row verified together by blocks, after SpecTr-GBV (Lin et al., arXiv 2604.25925).

The paper's rule is greedy: to keep the distribution it has to change the target's in later passes. As its authors' code
has it, it does not keep it within a pass either: of two tokens, M_b = M_s = (1/2, 1/2), chains of one draft and n = 2,
it rejects both in one pass of nine, and has then nothing left to draw the next token from. So the rule here is another
one, which keeps the distribution in every pass:

The first chain is verified by blocks (`block`). Where it ends the token after it is to be drawn from what is left,
max(p_i M_b - M_s, 0). A chain that begins with the same drafts has drawn the next ones on its own, so it is verified by
blocks from there on, with what is left in the target's place; and so on with every chain. Each step commits drafts as
the target would say them, whatever came before, so all of them do. More chains never accept less; one chain is block
verification.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from specformer_jax.decoding.verification.block import draw, judge_block


class SeveralVerdict(NamedTuple):
    """What is committed of several chains.

    Attributes:
      accepted: how many drafts.
      token: the token after them.
      chain: which of the chains they are of.
    """

    accepted: Int32[Array, ""]
    token: Int32[Array, ""]
    chain: Int32[Array, ""]


def judge_several(
    draft: Float32[Array, "n k V"],
    target: Float32[Array, "n 1+k V"],
    tokens: Int32[Array, "n k"],
    count: Int32[Array, ""] | int,
    uniforms: Float32[Array, "n k"],
) -> tuple[Int32[Array, ""], Float32[Array, " V"], Int32[Array, ""]]:
    """How many drafts are accepted, the distribution of the token after them, and which chain they are of.

    Args:
      draft: M_s after i drafts of each chain.
      target: M_b after i drafts of each chain.
      tokens: the chains, each drawn without regard to the others.
      count: how many drafts each of them has.
      uniforms: u_1 .. u_k of each chain, from 0 to 1.
    """
    n, k = tokens.shape
    accepted, rest = judge_block(draft[0], target[0], tokens[0], count, uniforms[0])
    chain = jnp.int32(0)
    for other in range(1, n):
        same = (tokens[other] == tokens[chain]) | (jnp.arange(k) >= accepted)
        joins = same.all() & (accepted < count)
        wanted = target[other].at[accepted].set(rest)
        further, left = judge_block(draft[other], wanted, tokens[other], count, uniforms[other], accepted)
        accepted, chain = jnp.where(joins, further, accepted), jnp.where(joins, other, chain)
        rest = jnp.where(joins, left, rest)
    return accepted, rest, chain


def verify_several(
    draft: Float32[Array, "n k V"],
    target: Float32[Array, "n 1+k V"],
    tokens: Int32[Array, "n k"],
    count: Int32[Array, ""] | int,
    uniforms: Float32[Array, "n k"],
    noise: Float32[Array, " V"],
) -> SeveralVerdict:
    """Verifies several chains of a row together.

    Args:
      draft, target, tokens, count, uniforms: as in `judge_several`.
      noise: Gumbel noise of each token, which draws the next one.
    """
    accepted, rest, chain = judge_several(draft, target, tokens, count, uniforms)
    return SeveralVerdict(accepted, draw(rest, noise), chain)
