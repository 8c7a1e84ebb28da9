"""What is done to the logits of a row before its token is chosen: what a grammar forbids, bias, penalties, bad words.

All of it is a function of the tokens before the place, drafts among them, so the answer is the same with any drafts. A
batch in which no row asks skips the work at run time, so one compiled program serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from specformer_jax.config import LONGEST_BAD_WORD, MOST_BAD_WORDS, SamplingParams
from specformer_jax.decoding.flat import Flat

MOST_BIASED = 512  # tokens of a row that may have a bias
FOREVER = 2**31 - 1
NO_TOKEN = 2**31 - 1  # past every vocabulary: scattering drops it


class Bias(NamedTuple):
    """What is added to the logit of a token, at positions below `until`."""

    token: int
    amount: float
    until: int = FOREVER


class RowProcessors(NamedTuple):
    """What is done to the logits of each row: the bias, the penalties in the order of their names, the bad words.

    Attributes:
      repetition: logits of tokens in prompt or answer are divided by it, or multiplied if negative; 0 is off.
      frequency: is taken from the logit of a token as often as the answer has it.
      presence: is taken from the logits of tokens that the answer has.
      biased: the tokens that have a bias.
      bias: what is added to their logits.
      until: the positions below which it is added.
      bad_words: sequences of tokens that the answer does not have, the last token of each first.
      bad_lengths: how many tokens each of them has; 0 is none.
    """

    repetition: Float32[Array, " B"]
    frequency: Float32[Array, " B"]
    presence: Float32[Array, " B"]
    biased: Int32[Array, "B biased"]
    bias: Float32[Array, "B biased"]
    until: Int32[Array, "B biased"]
    bad_words: Int32[Array, "B words longest"]
    bad_lengths: Int32[Array, "B words"]

    @property
    def asked(self) -> Bool[Array, " B"]:
        """Which rows want something done."""
        penalised = (self.repetition != 0) | (self.frequency != 0) | (self.presence != 0)
        return penalised | (self.until > 0).any(axis=1) | (self.bad_lengths > 0).any(axis=1)


class Allowed(NamedTuple):
    """The tokens that the grammar of a row allows after its last committed token and after each draft of its chain.

    Attributes:
      constrained: whether the row has a grammar.
      bits: bit v % 32 of word v // 32 says whether token v is allowed; of other rows they mean nothing.
    """

    constrained: Bool[Array, " B"]
    bits: UInt32[Array, "B 1+J words"]


class Before(NamedTuple):
    """The tokens before each of some places.

    Attributes:
      token: the tokens, in no order; `NO_TOKEN` stands for none.
      answered: whether each is of the answer, and not of the prompt.
      latest: the last tokens of the answer, the very last first; `NO_TOKEN` before its first.
    """

    token: Int32[Array, "R before"]
    answered: Bool[Array, "R before"]
    latest: Int32[Array, "R latest"]


def stack(sampling_params: Sequence[SamplingParams], ruled_out: Sequence[Bias] = ()) -> RowProcessors:
    """One array a field from one `SamplingParams` a row; every row has the biases `ruled_out`, too."""
    rows = len(sampling_params)
    biased, until = np.zeros((rows, MOST_BIASED), np.int32), np.zeros((rows, MOST_BIASED), np.int32)
    bias = np.zeros((rows, MOST_BIASED), np.float32)
    for row, params in enumerate(sampling_params):
        for i, entry in enumerate([*(Bias(token, amount) for token, amount in params.logit_bias), *ruled_out]):
            biased[row, i], bias[row, i], until[row, i] = entry
    words = np.zeros((rows, MOST_BAD_WORDS, LONGEST_BAD_WORD), np.int32)
    lengths = np.zeros((rows, MOST_BAD_WORDS), np.int32)
    for row, params in enumerate(sampling_params):
        for i, word in enumerate(params.bad_words):
            words[row, i, : len(word)], lengths[row, i] = word[::-1], len(word)
    repetition = [0 if p.repetition_penalty == 1 else p.repetition_penalty for p in sampling_params]
    return RowProcessors(
        repetition=jnp.asarray(np.array(repetition, np.float32)),
        frequency=jnp.asarray(np.array([p.frequency_penalty for p in sampling_params], np.float32)),
        presence=jnp.asarray(np.array([p.presence_penalty for p in sampling_params], np.float32)),
        biased=jnp.asarray(biased),
        bias=jnp.asarray(bias),
        until=jnp.asarray(until),
        bad_words=jnp.asarray(words),
        bad_lengths=jnp.asarray(lengths),
    )


def tokens_before(
    flat: Flat,
    place: Int32[Array, " R"],
    tokens: Int32[Array, "B C"],
    prompt: Int32[Array, " B"],
    known: Int32[Array, " B"],
    slots: int,
) -> Before:
    """The tokens up to and with each place: what is committed of its row, and the drafts that are read up to there.

    Args:
      flat: the batch.
      place: last committed tokens of rows that ask, or drafts behind them; elsewhere the result means nothing.
      tokens, prompt, known: of the `DecodeState` that the batch was made of.
      slots: the most drafts of a row.
    """
    seat = flat.places.row[place]
    row = jnp.minimum(flat.seats[seat], len(known) - 1)
    columns = jnp.arange(tokens.shape[1])
    committed = jnp.where(columns < known[row, None], tokens[row], NO_TOKEN)
    chain = flat.last[seat, None] + 1 + jnp.arange(slots)
    drafts = jnp.where(chain <= place[:, None], flat.token[jnp.minimum(chain, len(flat.token) - 1)], NO_TOKEN)
    back = jnp.arange(LONGEST_BAD_WORD - 1)
    column = flat.places.position[place][:, None] - back
    latest = jnp.where(
        column < known[row, None], tokens[row[:, None], column], flat.token[jnp.maximum(place[:, None] - back, 0)]
    )
    return Before(
        jnp.concatenate([committed, drafts], axis=1),
        jnp.concatenate([columns >= prompt[row, None], jnp.ones(drafts.shape, bool)], axis=1),
        jnp.where(column >= prompt[row, None], latest, NO_TOKEN),
    )


def forbid(
    logits: Float32[Array, "R V"], allowed: Allowed | None, row: Int32[Array, " R"], slot: Int32[Array, " R"]
) -> Float32[Array, "R V"]:
    """The logits, -inf where a grammar does not allow the token.

    Args:
      logits: the target's own.
      allowed: what the rows' grammars allow; None compiles nothing.
      row: the row of each place, B where it is nobody's.
      slot: how many drafts of the row's chain stand before the token to choose.
    """
    if allowed is None:
        return logits
    constrained = allowed.constrained.at[row].get(mode="fill", fill_value=False)

    def masked() -> Array:
        words = allowed.bits.at[row, slot].get(mode="clip")
        bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        bits = bits.reshape(len(words), -1)[:, : logits.shape[1]]
        return jnp.where(constrained[:, None] & (bits == 0), -jnp.inf, logits)

    return jax.lax.cond(jnp.any(constrained), masked, lambda: logits)


def process(
    logits: Float32[Array, "R V"],
    processors: RowProcessors | None,
    position: Int32[Array, " R"],
    before: Callable[[], Before],
) -> Float32[Array, "R V"]:
    """The logits that a token is chosen by.

    Args:
      logits: the target's own.
      processors: what each row wants; None does nothing, and compiles nothing.
      position: the absolute position of the token to choose.
      before: gives the tokens before it.
    """
    if processors is None:
        return logits
    rows, p = jnp.arange(len(logits))[:, None], processors

    def processed(logits: Array) -> Array:
        logits = logits.at[rows, p.biased].add(jnp.where(position[:, None] < p.until, p.bias, 0))
        token, answered, latest = before()
        counts = jnp.zeros(logits.shape, jnp.float32).at[rows, token].add(answered, mode="drop")
        seen = jnp.zeros(logits.shape, bool).at[rows, token].set(True, mode="drop")
        repetition = jnp.where(p.repetition == 0, 1, p.repetition)[:, None]
        repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(seen, repeated, logits)
        logits = logits - p.frequency[:, None] * counts - p.presence[:, None] * (counts > 0)
        needed = jnp.arange(1, LONGEST_BAD_WORD) < p.bad_lengths[:, :, None]
        begun = (~needed | (p.bad_words[:, :, 1:] == latest[:, None, :])).all(axis=2) & (p.bad_lengths > 0)
        return logits.at[rows, jnp.where(begun, p.bad_words[:, :, 0], NO_TOKEN)].set(-jnp.inf, mode="drop")

    return jax.lax.cond(jnp.any(p.asked), processed, lambda logits: logits, logits)
