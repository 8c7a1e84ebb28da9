"""kappa of a head: offline from the target's own answers, and by real decoding. The two count the same way.

kappa = tokens committed / target passes, as `DecodeState.steps` counts: without those that read the prompt, and without
the first token, which they give.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from specformer_jax.batch.generation import generate_ids
from specformer_jax.batch.row_batch import Rows
from specformer_jax.config import SamplingParams
from specformer_jax.decoding.pass_counts import PassCounts
from specformer_jax.decoding.sampling import RowSampling
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.planning.forecasts import Forecasts
from specformer_jax.training.data.documents import Document


class OfflineCounts(NamedTuple):
    """What drafts bring along answers that are known.

    Attributes:
      passes: at each of the draft lengths.
      forecasts: what the head forecast, and how sure it was.
    """

    passes: list[PassCounts]
    forecasts: Forecasts


def walk(right: np.ndarray, draft_length: int) -> tuple[int, int, np.ndarray]:
    """The passes that decode one answer, from which drafts are right.

    Reading the prompt gives token 0 of the answer. A pass at anchor a commits the right drafts before the first wrong
    one and one more token, and the next pass begins there.

    Args:
      right: which drafts of an answer of n tokens are right, bool[n - 1, J]: row a is drafted once answer token a is
        known, and slot j of it forecasts answer token a + 1 + j. Slots past the end are wrong.
      draft_length: k, how many of the J slots a pass takes.

    Returns:
      How many tokens the passes committed (n - 1), how many passes there were, and how often the draft at each of the k
      positions was committed.

    >>> right = np.array([[1, 1], [0, 1], [1, 0], [1, 0]], bool)
    >>> walk(right, 2)
    (4, 2, array([1, 1]))
    """
    n, at, steps = len(right), 0, 0
    accepted = np.zeros(draft_length, np.int64)
    while at < n:
        run = 0
        while run < draft_length and right[at, run]:
            run += 1
        committed = min(run + 1, n - at)  # where the answer ends, the pass's own token is one too many
        accepted[: committed - 1] += 1
        at += committed
        steps += 1
    return n, steps, accepted


def check_draft_lengths(lm: LanguageModel, draft_lengths: Sequence[int]) -> None:
    """Raises UserError where there is no head, or not so many slots."""
    if lm.model.drafter is None:
        raise UserError("there is no draft head to evaluate: give one with --draft")
    J = lm.model.max_draft_length
    if any(not 1 <= k <= J for k in draft_lengths):
        raise UserError(f"draft lengths {list(draft_lengths)} are not within 1 and the head's {J} slots")


def offline(
    lm: LanguageModel,
    documents: Sequence[Document],
    draft_lengths: Sequence[int],
    seeds: Sequence[int] | None = None,
    on_tokens: Callable[[int, int], None] = lambda answers, tokens: None,
) -> OfflineCounts:
    """kappa at several draft lengths from answers that the target has already written: one pass over each answer.

    Args:
      lm: a model with a head.
      documents: the target's own answers, each with the temperature it was sampled at.
      draft_lengths: the numbers of drafts to count with, each within 1 and J.
      seeds: the seed that each answer was sampled with; with them the drafts take the same noise as in decoding. None
        drafts greedily.
      on_tokens: is called after every document with how many answers and how many of their tokens are counted.

    Raises:
      UserError: no head, or a draft length that it does not have.
    """
    check_draft_lengths(lm, draft_lengths)
    counts, run_lengths, sureness = [PassCounts(k) for k in draft_lengths], [], []
    answers = tokens = 0
    for number, document in enumerate(documents):
        seed = 0 if seeds is None else seeds[number]
        temperature = 0.0 if seeds is None else document.temperature
        for begin, end in document.answers:
            answers, tokens = answers + 1, tokens + end - begin
            if end - begin < 2:
                continue
            right, confidence = _forecast(lm, document.tokens[:end], begin, seed, temperature)
            for count in counts:
                count.add(*walk(right, count.draft_length))
            run_lengths.append(_run_lengths(right))
            sureness.append(confidence)
        on_tokens(answers, tokens)
    return OfflineCounts(counts, Forecasts(run_lengths, sureness))


def forecast_everywhere(
    lm: LanguageModel, prompt: Sequence[int], answer: Sequence[int]
) -> tuple[Int[np.ndarray, " places"], Float[np.ndarray, "places J"]]:
    """What the head forecasts at every place of a greedy answer but its last: what drafts there bring follows from it.

    Returns:
      How many drafts are right before the first wrong one, and how sure the head is of each slot.
    """
    right, confidence = _forecast(lm, np.array([*prompt, *answer], np.int32), len(prompt), 0, 0.0)
    return _run_lengths(right), confidence


def _run_lengths(right: Bool[np.ndarray, "places J"]) -> Int[np.ndarray, " places"]:
    """How many drafts are right before the first wrong one."""
    return np.cumprod(right, axis=1).sum(axis=1)


def _forecast(
    lm: LanguageModel, tokens: np.ndarray, prompt: int, seed: int, temperature: float
) -> tuple[Bool[np.ndarray, "places J"], Float[np.ndarray, "places J"]]:
    """Which drafts are right at every place of an answer but its last (see `walk`), and how sure the head is."""
    size = -(-len(tokens) // 64) * 64
    padded = np.zeros((1, size), np.int32)
    padded[0, : len(tokens)] = tokens
    chain = jax.device_get(
        draft_everywhere(lm.model, lm.params, jnp.asarray(padded), jnp.uint32(seed), jnp.float32(temperature))
    )
    right, here = right_drafts(chain.tokens[0], tokens, prompt)
    return right, chain.confidence[0, here]


def right_drafts(
    drafts: Int[np.ndarray, "T J"], tokens: Int[np.ndarray, " n"], prompt: int
) -> tuple[Bool[np.ndarray, "places J"], slice]:
    """Which drafts are right at every place of an answer but its last (see `walk`), and where in `drafts` these are.

    Args:
      drafts: the chain at every position of a sequence.
      tokens: the sequence up to the answer's end.
      prompt: how many of its tokens come before the answer.
    """
    J, places = drafts.shape[1], len(tokens) - prompt - 1
    first = prompt - 1  # the anchor whose next token is the answer's first
    here = slice(first, first + places)
    ahead = first + np.arange(places)[:, None] + 2 + np.arange(J)
    return (ahead < len(tokens)) & (drafts[here] == tokens[np.minimum(ahead, len(tokens) - 1)]), here


@functools.partial(jax.jit, static_argnames="model")
def draft_everywhere(model, params, tokens, seed, temperature):
    """The chains that decoding would draft at every position of sequences: tokens i32[R, T] -> `Chain` [R, T, J]."""
    out = model.target.apply({"params": params["target"]}, tokens)
    following = jnp.roll(tokens, -1, axis=1)
    context, cache = model.observe(params, out.hooks, following, None, (*out.cache, None))
    one = functools.partial(jnp.broadcast_to, shape=tokens.shape[:1])
    rows = RowSampling(one(temperature), one(0), one(1.0), one(0.0), one(seed))
    start = jnp.zeros(tokens.shape[:1], jnp.int32)
    return model.draft(params, context, cache, start, following, tokens, rows, model.max_draft_length)


def decode(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    draft_length: int,
    batch_size: int = 8,
    on_tokens: Callable[[int, int], None] = lambda answers, tokens: None,
) -> tuple[PassCounts, list[list[int]]]:
    """kappa by real decoding, and the answers.

    Args:
      lm: a model with a head.
      prompts: the token ids of each prompt.
      sampling_params: how the answers are sampled.
      draft_length: k, how many tokens each step drafts.
      batch_size: how many rows are decoded together.
      on_tokens: is called after every few steps with how many answers have ended, and how many tokens there are.

    Returns:
      The counts over all answers, and the token ids of each answer; none where the row could not be decoded.

    Raises:
      UserError: a draft length that the head does not have.
    """
    count = PassCounts(draft_length)
    answers: list[list[int]] = [[] for _ in prompts]
    ended = tokens = 0  # of the batches before

    def look(indices: Sequence[int], rows: Rows) -> None:
        asked = slice(len(indices))  # the other rows fill the batch up
        on_tokens(ended + int(rows.done[asked].sum()), tokens + int((rows.known - rows.prompt)[asked].sum()))

    found = generate_ids(lm, prompts, sampling_params, draft_length=draft_length, batch_size=batch_size, on_rows=look)
    for i, answer in found:
        ended, tokens = ended + 1, tokens + answer.completion_tokens
        if answer.error is None and answer.steps:
            count.add(answer.completion_tokens - 1, answer.steps, answer.accepted_per_position)
        answers[i] = answer.token_ids
    return count, answers
