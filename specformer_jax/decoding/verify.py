"""The seed-exact acceptance rule: a draft is accepted while it is the token the target itself would have chosen.

The target's token at absolute position n is argmax_v(processed_logits[v] + gumbel(seed, n, v)), a function of the
request alone. Which drafts were proposed decides how many tokens a pass commits, never which.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import Sample, accept, lm_head_logits, logit_threshold
from specformer_jax.decoding.sampling import RowSampling
from specformer_jax.nn.sharded_kernels import sample_hidden, sample_logits


class Verdict(NamedTuple):
    """What one target pass decided.

    Attributes:
      accepted: how many drafts were right before the first wrong one, 0 to W - 1.
      token: the target's own token after them.
      tokens: the target's token after each window index; the committed ones are tokens[b, : accepted[b] + 1].
    """

    accepted: Int32[Array, " B"]
    token: Int32[Array, " B"]
    tokens: Int32[Array, "B W"]


def choose(
    hidden: Float[Array, "R D"],
    lm_head: Float[Array, "V D"],
    position: Int32[Array, " R"],
    sampling: RowSampling,
    *,
    truncation: bool = True,
) -> Sample:
    """The target's token at one position of each row.

    Args:
      hidden: the target's last hidden state at the position before, after the final norm.
      lm_head: the target's LM head.
      position: the absolute position of the token to choose.
      sampling: how each row is sampled.
      truncation: static; False compiles no top-k, top-p and min-p (rows that ask for them must not be there), and
        then the fused kernel never holds the logits.
    """
    s = sampling
    if not truncation:
        return sample_hidden(hidden, lm_head, seed=s.seed, position=position, temperature=s.temperature)
    logits = lm_head_logits(hidden, lm_head)
    threshold = logit_threshold(logits, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)
    return sample_logits(logits, seed=s.seed, position=position, temperature=s.temperature, threshold=threshold)


def verify(
    hidden: Float[Array, "B W D"],
    drafts: Int32[Array, "B W-1"],
    lengths: Int32[Array, " B"],
    lm_head: Float[Array, "V D"],
    sampling: RowSampling,
    *,
    truncation: bool = True,
) -> Verdict:
    """Chooses the target's token after each window index and accepts drafts while they agree.

    Args:
      hidden: the target's last hidden states over the window, after the final norm.
      drafts: what the window holds after its first token; -1 is never accepted.
      lengths: the absolute position of window index 0.
      lm_head: the target's LM head.
      sampling: how each row is sampled.
      truncation: static, as in `choose`.
    """
    rows, window, width = hidden.shape
    position = (lengths[:, None] + 1 + jnp.arange(window)).reshape(-1)
    sample = choose(hidden.reshape(-1, width), lm_head, position, sampling.repeat(window), truncation=truncation)
    tokens = sample.token.reshape(rows, window)
    return Verdict(*accept(drafts, tokens), tokens)
