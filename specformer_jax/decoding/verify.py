"""The seed-exact acceptance rule: a draft is accepted while it is the token the target itself would have chosen.

The target's token at absolute position n is argmax_v(processed_logits[v] + gumbel(seed, n, v)), a function of the
request alone. Which drafts were proposed decides how many tokens a pass commits, never which.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import Sample, accept, lm_head_logits, logit_threshold
from specformer_jax.decoding.flat import Flat
from specformer_jax.decoding.processors import forbid, process, tokens_before
from specformer_jax.decoding.state import BINS, BROKEN, DecodeState
from specformer_jax.nn.sharded_kernels import sample_hidden, sample_logits


class Verdict(NamedTuple):
    """What one target pass decided, for each seat of its flat batch.

    Attributes:
      accepted: how many drafts were right before the first wrong one; 0 where the seat asks for no token.
      token: the target's own token after them.
      tokens: the target's token after the last committed one and after each draft; those that may be committed are
        tokens[s, : accepted[s] + 1]. Where the target's hidden state is not finite there is none: `BROKEN`.
    """

    accepted: Int32[Array, " S"]
    token: Int32[Array, " S"]
    tokens: Int32[Array, "S 1+J"]


def choose(
    hidden: Float[Array, "R D"],
    place: Int32[Array, " R"],
    flat: Flat,
    state: DecodeState,
    lm_head: Float[Array, "V D"],
    *,
    truncation: bool = True,
) -> Sample:
    """The target's token after some places.

    Args:
      hidden: the target's last hidden state at each place, after the final norm.
      place: where they stand in the batch: last committed tokens of rows that ask, or drafts behind them; elsewhere the
        result means nothing.
      flat, state, lm_head: as in `verify`.
      truncation: static; False compiles no top-k, top-p and min-p (rows that ask for them must not be there), and
        then, where no row may have processors or a grammar either, the fused kernel never holds the logits.
    """
    seat = flat.places.row[place]
    row, position = flat.seats[seat], flat.places.position[place] + 1
    s, slots = state.sampling.at(row), state.drafts.shape[1]
    if not truncation and s.processors is None and state.allowed is None:
        return sample_hidden(hidden, lm_head, seed=s.seed, position=position, temperature=s.temperature)
    logits = forbid(lm_head_logits(hidden, lm_head), state.allowed, row, place - flat.last[seat])
    before = lambda: tokens_before(flat, place, state.tokens, state.prompt, state.known, slots)
    logits = process(logits, s.processors, position, before)
    threshold = None
    if truncation:
        threshold = logit_threshold(logits, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)
    return sample_logits(logits, seed=s.seed, position=position, temperature=s.temperature, threshold=threshold)


def verify(
    hidden: Float[Array, "T D"],
    flat: Flat,
    state: DecodeState,
    lm_head: Float[Array, "V D"],
    *,
    truncation: bool = True,
) -> Verdict:
    """Chooses the target's token after each place that asks, and accepts drafts while they agree.

    Args:
      hidden: the target's last hidden states over the flat batch, after the final norm.
      flat: the batch.
      state: tells how rows are sampled, and how many drafts they may have.
      lm_head: the target's LM head.
      truncation: static, as in `choose`.
    """
    width = state.drafts.shape[1] + 1
    at = flat.asking(width)
    # Whichever is fewer: all places of the batch, or those that may ask.
    everywhere = len(flat.token) <= at.size
    chosen = jnp.arange(len(flat.token)) if everywhere else at.reshape(-1)
    asking = hidden if everywhere else hidden[chosen]
    sample = choose(asking, chosen, flat, state, lm_head, truncation=truncation)
    token = jnp.where(jnp.isfinite(asking).all(axis=-1), sample.token, BROKEN)
    tokens = token[at] if everywhere else token.reshape(at.shape)
    drafts = jnp.where(flat.drafted(width - 1), flat.token[at[:, 1:]], -1)
    return Verdict(*accept(drafts, tokens), tokens)


def commit(state: DecodeState, flat: Flat, verdict: Verdict, eos_ids: tuple[int, ...]) -> DecodeState:
    """Advances lengths, and takes the committed tokens up to the end token, the limit or what is `BROKEN`.

    Args:
      state: as it was when the batch was allocated, with the cache written; the drafts are spent.
      eos_ids: the tokens that end an answer.
    """
    seats, width = flat.seats, verdict.tokens.shape[1]
    index = jnp.arange(width)
    known, limit, prompt = (flat.seated(x) for x in (state.known, state.limit, state.prompt))
    committed = jnp.minimum(verdict.accepted + 1, limit - known)
    is_end = jnp.isin(verdict.tokens, jnp.array([*eos_ids, BROKEN], jnp.int32)) & (index < committed[:, None])
    first_end = jnp.where(is_end, index, width).min(axis=1)
    committed = jnp.where(flat.asks, jnp.minimum(committed, first_end + 1), 0)
    ended = flat.asks & ((first_end < width) | (known + committed >= limit))
    keep = index < committed[:, None]

    columns = jnp.where(keep, known[:, None] + index, state.tokens.shape[1])
    read = flat.drafted(width - 1)
    right = read & (index[:-1] < verdict.accepted[:, None])
    tried = read & (index[:-1] <= verdict.accepted[:, None])
    bins = jnp.clip((flat.seated(state.confidence) * BINS).astype(jnp.int32), 0, BINS - 1)
    counts = jnp.stack([tried, right], axis=-1).astype(jnp.int32)

    def add(old: Array, new: Array) -> Array:
        return old.at[seats].add(new.astype(jnp.int32), mode="drop")

    return state._replace(
        tokens=state.tokens.at[seats[:, None], columns].set(verdict.tokens, mode="drop"),
        from_draft=state.from_draft.at[seats[:, None], columns].set(index < verdict.accepted[:, None], mode="drop"),
        known=add(state.known, committed),
        read=add(state.read, flat.reads + jnp.maximum(committed - 1, 0)),
        done=state.done.at[seats].set(ended, mode="drop"),
        drafts=state.drafts.at[seats].set(-1, mode="drop"),
        steps=add(state.steps, flat.asks & (known > prompt)),
        drafted=add(state.drafted, read),
        accepted=add(state.accepted, keep[:, 1:]),
        outcomes=state.outcomes.at[index[:-1], bins].add(counts),
    )
