"""The seed-exact acceptance rule: a draft is accepted while it is the token the target itself would have chosen.

The target's token at absolute position n is argmax_v(processed_logits[v] + gumbel(seed, n, v)), a function of the
request alone. Which drafts were proposed decides how many tokens a pass commits, never which.

Drafts that were drawn are verified in another way (`verification.block`), which keeps the distribution alone; FLy
(`verification.fly`) lets some wrong ones pass, and keeps neither.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import Sample, accept, gumbel, lm_head_logits, logit_threshold
from specformer_jax.decoding.flat import Flat
from specformer_jax.decoding.processors import forbid, process, tokens_before
from specformer_jax.decoding.sampling import RowSampling, distribution
from specformer_jax.decoding.state import BINS, BROKEN, DecodeState
from specformer_jax.decoding.verification import noise
from specformer_jax.decoding.verification.block import verify_block
from specformer_jax.decoding.verification.fly import entropy_of_likeliest, loosely_accepted
from specformer_jax.decoding.verification.kind import FLY, Verification
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


class Asked(NamedTuple):
    """Places of a batch that ask for a token.

    Attributes:
      place: where they stand in the batch.
      seat: whose they are.
      row: the row in that seat, B where nobody sits.
      position: of the token that is asked for.
      sampling: how it is sampled.
    """

    place: Int32[Array, " R"]
    seat: Int32[Array, " R"]
    row: Int32[Array, " R"]
    position: Int32[Array, " R"]
    sampling: RowSampling

    @classmethod
    def of(cls, place: Int32[Array, " R"], flat: Flat, state: DecodeState) -> Asked:
        """These places of the batch."""
        seat = flat.places.row[place]
        row, position = flat.seats[seat], flat.places.position[place] + 1
        return cls(place, seat, row, position, state.sampling.at(row))


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
    asked = Asked.of(place, flat, state)
    s, position = asked.sampling, asked.position
    if not truncation and s.processors is None and state.allowed is None:
        return sample_hidden(hidden, lm_head, seed=s.seed, position=position, temperature=s.temperature)
    logits, threshold = processed_logits(hidden, asked, flat, state, lm_head, truncation=truncation)
    return sample_logits(logits, seed=s.seed, position=position, temperature=s.temperature, threshold=threshold)


def processed_logits(
    hidden: Float[Array, "R D"],
    asked: Asked,
    flat: Flat,
    state: DecodeState,
    lm_head: Float[Array, "V D"],
    *,
    truncation: bool = True,
) -> tuple[Float32[Array, "R V"], Float32[Array, " R"] | None]:
    """The logits that the token after each place is chosen by, and what top-k, top-p and min-p leave of them.

    Args:
      asked: the places.
      hidden, flat, state, lm_head, truncation: as in `choose`.
    """
    s, slots = asked.sampling, state.drafts.shape[1]
    logits = forbid(lm_head_logits(hidden, lm_head), state.allowed, asked.row, asked.place - flat.last[asked.seat])
    before = lambda: tokens_before(flat, asked.place, state.tokens, state.prompt, state.known, slots)
    logits = process(logits, s.processors, asked.position, before)
    threshold = None
    if truncation:
        threshold = logit_threshold(logits, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)
    return logits, threshold


def verify(
    hidden: Float[Array, "T D"],
    flat: Flat,
    state: DecodeState,
    lm_head: Float[Array, "V D"],
    *,
    truncation: bool = True,
    verification: Verification = Verification(),
) -> Verdict:
    """Chooses the target's token after each place that asks, and accepts drafts while they agree.

    Args:
      hidden: the target's last hidden states over the flat batch, after the final norm.
      flat: the batch.
      state: tells how rows are sampled, and how many drafts they may have.
      lm_head: the target's LM head.
      truncation: static, as in `choose`.
      verification: static, how drafts are judged that were not drawn.
    """
    if state.drawn_from is not None:
        return _verify_drawn(hidden, flat, state, lm_head, truncation)
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
    exact = Verdict(*accept(drafts, tokens), tokens)
    if verification.name != FLY or width == 1:
        return exact
    return _loosen(exact, hidden, flat, state, lm_head, truncation, verification)


def _loosen(
    exact: Verdict,
    hidden: Float[Array, "T D"],
    flat: Flat,
    state: DecodeState,
    lm_head: Float[Array, "V D"],
    truncation: bool,
    verification: Verification,
) -> Verdict:
    """FLy: drafts that are not the target's tokens may pass; the token after those that do is the target's own."""
    at = flat.asking(exact.tokens.shape[1])
    drafts, ahead = flat.token[at[:, 1:]], at[:, :-1]
    asked = Asked.of(ahead.reshape(-1), flat, state)
    logits, threshold = processed_logits(hidden[asked.place], asked, flat, state, lm_head, truncation=truncation)
    temperature = jnp.where(asked.sampling.temperature > 0, asked.sampling.temperature, 1.0)
    accepted = loosely_accepted(
        drafts == exact.tokens[:, :-1],
        entropy_of_likeliest(distribution(logits, temperature, threshold)).reshape(ahead.shape),
        flat.drafts,
        window=verification.fly_window,
        least=verification.fly_entropy,
    )
    token = jnp.take_along_axis(exact.tokens, accepted[:, None], axis=1)[:, 0]
    return Verdict(accepted, token, _behind_accepted(drafts, accepted, exact.tokens))


def _behind_accepted(
    drafts: Int32[Array, "S J"], accepted: Int32[Array, " S"], tokens: Int32[Array, "S _"]
) -> Int32[Array, "S 1+J"]:
    """The accepted drafts, and behind them what else stands there."""
    width = drafts.shape[1] + 1
    return jnp.where(jnp.arange(width) < accepted[:, None], jnp.pad(drafts, ((0, 0), (0, 1))), tokens)


def _verify_drawn(
    hidden: Float[Array, "T D"], flat: Flat, state: DecodeState, lm_head: Float[Array, "V D"], truncation: bool
) -> Verdict:
    """Block verification of every seat's drafts."""
    assert state.drawn_from is not None
    width = state.drafts.shape[1] + 1
    at = flat.asking(width)
    asked = Asked.of(at.reshape(-1), flat, state)
    logits, threshold = processed_logits(hidden[asked.place], asked, flat, state, lm_head, truncation=truncation)
    target = distribution(logits, asked.sampling.temperature, threshold).reshape(*at.shape, -1)
    seed = flat.seated(state.sampling.seed)[:, None]
    finite = jnp.isfinite(hidden[at]).all(axis=-1)
    count = jnp.minimum(flat.drafts, jnp.cumprod(finite, axis=1).sum(axis=1))  # what is broken ends a chain

    begin, slots = flat.places.position[flat.last] + 1, jnp.arange(1, width)
    passes = noise.slot_positions(begin[:, None], slots)
    uniforms = noise.uniform(noise.stream(seed, noise.ACCEPTANCE), passes)
    rest = gumbel(noise.stream(seed, noise.REST), begin[:, None], jnp.arange(target.shape[-1]))
    drafts = flat.token[at[:, 1:]]
    found = jax.vmap(verify_block)(flat.seated(state.drawn_from), target, drafts, count, uniforms, rest)
    broken = ~jnp.take_along_axis(finite, found.accepted[:, None], axis=1)[:, 0]
    token = jnp.where(broken, BROKEN, found.token)
    accepted = jnp.where(flat.asks, found.accepted, 0)
    return Verdict(accepted, token, _behind_accepted(drafts, accepted, token[:, None]))


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
    promised = jax.nn.sigmoid(flat.seated(state.log_odds))
    surplus = jnp.where(tried, right - promised, 0).sum(axis=1)
    evidence = jnp.where(tried, promised * (1 - promised), 0).sum(axis=1)

    def add(old: Array, new: Array) -> Array:
        return old.at[seats].add(new.astype(old.dtype), mode="drop")

    return state._replace(
        tokens=state.tokens.at[seats[:, None], columns].set(verdict.tokens, mode="drop"),
        from_draft=state.from_draft.at[seats[:, None], columns].set(index < verdict.accepted[:, None], mode="drop"),
        known=add(state.known, committed),
        read=add(state.read, flat.reads + jnp.maximum(committed - 1, 0)),
        done=state.done.at[seats].set(ended, mode="drop"),
        drafts=state.drafts.at[seats].set(-1, mode="drop"),
        surplus=add(state.surplus, surplus),
        evidence=add(state.evidence, evidence),
        steps=add(state.steps, flat.asks & (known > prompt)),
        drafted=add(state.drafted, read),
        accepted=add(state.accepted, keep[:, 1:]),
        outcomes=state.outcomes.at[index[:-1], bins].add(counts),
    )
