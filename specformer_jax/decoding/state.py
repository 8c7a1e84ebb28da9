"""The state of a batch in flight."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from specformer_jax.config import Shape
from specformer_jax.decoding.logprobs import Logprobs
from specformer_jax.decoding.model import Cache, Model
from specformer_jax.decoding.sampling import RowSampling
from specformer_jax.decoding.verify import Verdict


class DecodeState(NamedTuple):
    """A batch in flight: each row has its own length, acceptance, sampling and limit.

    Attributes:
      cache: L layers of keys and values, and what the drafter keeps; positions below `lengths` are committed.
      lengths: how many committed tokens are in the cache: prompt and answer without the last token.
      last_token: the token at absolute position `lengths`, which the target has not read yet.
      drafts: forecasts of the tokens after it; -1 is no draft.
      draft_cap: the most drafts that the row takes.
      output: the answer so far.
      from_draft: which of its tokens were accepted drafts.
      emitted: how much of `output` is written.
      limit: the most tokens of the row's answer, at most M.
      done: whether the row is finished or was never filled; the step leaves it as it is.
      sampling: how each row is sampled.
      steps: target passes that decoded for the row; the prefill is not counted.
      drafted: how often a draft stood at each place of the window.
      accepted: how often the draft at each place was accepted.
      logprobs: log-probabilities of the answer, for the rows that ask; None keeps none.
    """

    cache: Cache
    lengths: Int32[Array, " B"]
    last_token: Int32[Array, " B"]
    drafts: Int32[Array, "B drafts"]
    draft_cap: Int32[Array, " B"]
    output: Int32[Array, "B M"]
    from_draft: Bool[Array, "B M"]
    emitted: Int32[Array, " B"]
    limit: Int32[Array, " B"]
    done: Bool[Array, " B"]
    sampling: RowSampling
    steps: Int32[Array, " B"]
    drafted: Int32[Array, "B drafts"]
    accepted: Int32[Array, "B drafts"]
    logprobs: Logprobs | None = None


def init_state(
    model: Model, shape: Shape, sampling: RowSampling, limit: Int32[Array, " B"], max_new_tokens: int
) -> DecodeState:
    """An empty batch: every row is done until `decode.prefill` fills it.

    Args:
      shape: how many rows, tokens of a window and positions of the cache there are.
      sampling: how each row is sampled.
      limit: the most tokens of each row's answer.
      max_new_tokens: static, M, columns of the output.
    """
    rows, drafts = shape.rows, shape.window - 1

    def zeros():  # an array of its own for each field: the state is donated
        return jnp.zeros(rows, jnp.int32)

    return DecodeState(
        cache=model.create_cache(rows, shape.positions),
        lengths=zeros(),
        last_token=zeros(),
        drafts=jnp.full((rows, drafts), -1, jnp.int32),
        draft_cap=jnp.full(rows, drafts, jnp.int32),
        output=jnp.zeros((rows, max_new_tokens), jnp.int32),
        from_draft=jnp.zeros((rows, max_new_tokens), bool),
        emitted=zeros(),
        limit=jnp.minimum(limit, max_new_tokens),
        done=jnp.ones(rows, bool),
        sampling=sampling,
        steps=zeros(),
        drafted=jnp.zeros((rows, drafts), jnp.int32),
        accepted=jnp.zeros((rows, drafts), jnp.int32),
    )


def midway(state: DecodeState, length: int) -> DecodeState:
    """The batch with all rows running, `length` tokens in, for timing: what the cache holds does not change a step."""
    rows, max_new_tokens = state.output.shape

    def each(value, dtype):
        return jax.device_put(np.full(rows, value, dtype))

    return state._replace(
        lengths=each(length, np.int32),
        emitted=each(0, np.int32),
        limit=each(max_new_tokens, np.int32),
        done=each(False, bool),
    )


def begin(state: DecodeState, fresh: Bool[Array, " B"], position: Int32[Array, " B"]) -> DecodeState:
    """The `fresh` rows as they stand when their prompt's last token, at `position`, has been read."""
    return state._replace(
        lengths=jnp.where(fresh, position, state.lengths),
        emitted=jnp.where(fresh, 0, state.emitted),
        done=state.done & ~fresh,
        steps=jnp.where(fresh, -1, state.steps),  # the commit of the first token counts one
        drafts=jnp.where(fresh[:, None], -1, state.drafts),
        drafted=jnp.where(fresh[:, None], 0, state.drafted),
        accepted=jnp.where(fresh[:, None], 0, state.accepted),
    )


def commit(
    state: DecodeState,
    verdict: Verdict,
    drafts: Int32[Array, "B drafts"],
    cache: Cache,
    active: Bool[Array, " B"],
    eos_ids: tuple[int, ...],
) -> DecodeState:
    """Advances lengths, emits the committed tokens up to the end token or the limit, and takes the new drafts.

    Args:
      verdict: over a window, which may be narrower than the state's.
      drafts: the next chain.
      cache: with the window written.
      active: whether the window belongs to the row; other rows stay as they are.
      eos_ids: the tokens that end an answer.
    """
    rows, window = verdict.tokens.shape
    index = jnp.arange(window)
    committed = jnp.minimum(verdict.accepted + 1, state.limit - state.emitted)
    is_end = jnp.isin(verdict.tokens, jnp.array(eos_ids, jnp.int32)) & (index < committed[:, None])
    first_end = jnp.where(is_end, index, window).min(axis=1)
    committed = jnp.where(active, jnp.minimum(committed, first_end + 1), 0)
    keep = index < committed[:, None]  # [B, W']

    each = jnp.arange(rows)[:, None]
    columns = jnp.where(keep, state.emitted[:, None] + index, state.output.shape[1])
    emitted = state.emitted + committed
    drafted = (state.drafts[:, : window - 1] >= 0) & active[:, None]
    drafts = jnp.where(jnp.arange(drafts.shape[1]) < state.draft_cap[:, None], drafts, -1)
    return state._replace(
        cache=cache,
        lengths=state.lengths + jnp.where(active, verdict.accepted + 1, 0),
        last_token=jnp.where(active, verdict.token, state.last_token),
        drafts=jnp.where(active[:, None], drafts, state.drafts),
        output=state.output.at[each, columns].set(verdict.tokens, mode="drop"),
        from_draft=state.from_draft.at[each, columns].set(index < verdict.accepted[:, None], mode="drop"),
        emitted=emitted,
        done=jnp.where(active, (first_end < window) | (emitted >= state.limit), state.done),
        steps=state.steps + active,
        drafted=state.drafted.at[:, : window - 1].add(drafted.astype(jnp.int32)),
        accepted=state.accepted.at[:, : window - 1].add(keep[:, 1:].astype(jnp.int32)),
    )
