"""The state of a batch in flight."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from specformer_jax.config import Shape
from specformer_jax.decoding.logprobs import Logprobs
from specformer_jax.decoding.model import Cache, Model
from specformer_jax.decoding.processors import Allowed
from specformer_jax.decoding.sampling import RowSampling
from specformer_jax.nn import cache as cache_lib

BINS = 16  # of confidence, in which outcomes of drafts are counted
DOUBT = 4.0  # what a row's evidence is weighed against before its own offset is believed
FARTHEST = 4.0  # a row's own offset is at most
BROKEN = -2  # stands in the place of a row's last token where the target's hidden state was not finite
BROKEN_REASON = "the target's hidden states are not finite: its weights are damaged, or overflow in this dtype"


class DecodeState(NamedTuple):
    """A batch in flight: each row has its own length, acceptance, sampling and limit.

    Attributes:
      cache: L layers of pages of keys and values, and what the drafter keeps; positions below `read` are committed.
      pages: which pages hold each row, in the order of its positions.
      tokens: prompt and answer; tokens[b, : known[b]] are committed; the last one of a row may be `BROKEN`.
      prompt: how many of them are the prompt's.
      known: how many tokens are committed.
      read: how many of them are in the cache; the last one never is.
      limit: `known` stops there.
      done: whether the row is finished or was never filled; the step leaves it as it is.
      arrival: prompts of rows with a lower number are read first.
      drafts: forecasts of the tokens after the committed ones; -1 is no draft.
      confidence: how sure the drafter was of each.
      draft_cap: the most drafts that the row takes.
      calibration: slope and offset, slot by slot, that turn confidence into the chance of being right.
      surplus: how many more drafts of the row were right than their confidence promised.
      evidence: the variance of that number.
      sampling: how each row is sampled.
      from_draft: which tokens were accepted drafts.
      steps: target passes that decoded for the row; those over its prompt are not counted.
      drafted: how often a draft stood at each place after the last committed token.
      accepted: how often the draft at each place was accepted.
      outcomes: how often drafts were read that stood after right ones only, and how often they were right then, by slot
        and confidence; of all rows.
      logprobs: log-probabilities of the answers, for the rows that ask; None keeps none.
      allowed: what the grammars of rows allow, for one step; None where no row may have one.
      drawn_from: what each draft was drawn from; None where drafts are not drawn.
    """

    cache: Cache
    pages: Int32[Array, "B tables"]
    tokens: Int32[Array, "B C"]
    prompt: Int32[Array, " B"]
    known: Int32[Array, " B"]
    read: Int32[Array, " B"]
    limit: Int32[Array, " B"]
    done: Bool[Array, " B"]
    arrival: Int32[Array, " B"]
    drafts: Int32[Array, "B J"]
    confidence: Float32[Array, "B J"]
    draft_cap: Int32[Array, " B"]
    calibration: Float32[Array, "J 2"]
    surplus: Float32[Array, " B"]
    evidence: Float32[Array, " B"]
    sampling: RowSampling
    from_draft: Bool[Array, "B C"]
    steps: Int32[Array, " B"]
    drafted: Int32[Array, "B J"]
    accepted: Int32[Array, "B J"]
    outcomes: Int32[Array, "J BINS 2"]
    logprobs: Logprobs | None = None
    allowed: Allowed | None = None
    drawn_from: Float32[Array, "B J V"] | None = None

    @property
    def reading(self) -> Bool[Array, " B"]:
        """The rows whose prompt has not been read to its end."""
        return ~self.done & (self.known == self.prompt)

    @property
    def log_odds(self) -> Float32[Array, "B J"]:
        """Of each draft being right once all before it were, by its confidence: slope * logit(confidence) + offset."""
        confidence = jnp.clip(self.confidence, 1e-4, 1 - 1e-4)
        slope, offset = self.calibration.T
        return slope * jnp.log(confidence / (1 - confidence)) + offset

    @property
    def row_offset(self) -> Float32[Array, " B"]:
        """What a row's own record adds to these: one step of Newton's method from 0, towards its surplus."""
        return jnp.clip(self.surplus / (self.evidence + DOUBT), -FARTHEST, FARTHEST)


def init_state(model: Model, shape: Shape, sampling: RowSampling, pages: int | None = None) -> DecodeState:
    """An empty batch: every row is done until it is given tokens.

    Args:
      shape: how many rows, drafts of a step and positions of a row there are.
      sampling: how each row is sampled.
      pages: how many pages the cache has; None gives each row its own, one after the other in the table.
    """
    rows, drafts, columns = shape.rows, shape.window - 1, shape.positions
    tables = cache_lib.pages_for(columns)

    def zeros():  # an array of its own for each field: the state is donated
        return jnp.zeros(rows, jnp.int32)

    return DecodeState(
        cache=model.create_cache(rows * tables if pages is None else pages),
        pages=cache_lib.identity_table(rows, tables) if pages is None else jnp.zeros((rows, tables), jnp.int32),
        tokens=jnp.zeros((rows, columns), jnp.int32),
        prompt=zeros(),
        known=zeros(),
        read=zeros(),
        limit=zeros(),
        done=jnp.ones(rows, bool),
        arrival=jnp.arange(rows, dtype=jnp.int32),
        drafts=jnp.full((rows, drafts), -1, jnp.int32),
        confidence=jnp.zeros((rows, drafts), jnp.float32),
        draft_cap=jnp.full(rows, drafts, jnp.int32),
        calibration=jnp.tile(jnp.array([1.0, 0.0], jnp.float32), (drafts, 1)),
        surplus=jnp.zeros(rows, jnp.float32),
        evidence=jnp.zeros(rows, jnp.float32),
        sampling=sampling,
        from_draft=jnp.zeros((rows, columns), bool),
        steps=zeros(),
        drafted=jnp.zeros((rows, drafts), jnp.int32),
        accepted=jnp.zeros((rows, drafts), jnp.int32),
        outcomes=jnp.zeros((drafts, BINS, 2), jnp.int32),
        drawn_from=jnp.zeros((rows, drafts, model.target.config.vocab_size)) if model.draws and drafts else None,
    )


def midway(state: DecodeState, length: int) -> DecodeState:
    """The batch with all rows running, `length` tokens in, for timing: what the cache holds does not change a step."""
    rows, columns = state.tokens.shape

    def each(value, dtype):
        return jax.device_put(np.full(rows, value, dtype))

    return state._replace(
        prompt=each(length, np.int32),
        known=each(length + 1, np.int32),
        read=each(length, np.int32),
        limit=each(columns, np.int32),
        done=each(False, bool),
        drafts=jax.device_put(np.zeros(state.drafts.shape, np.int32)),
    )
