"""Generating text for any number of prompts: batches of ragged rows over the compiled programs of `decode`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specformer_jax.batch import auto_draft_length
from specformer_jax.batch.prompt_files import Conversation
from specformer_jax.config import SamplingParams, Shape, bucket
from specformer_jax.decoding import decode, sampling
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel

STEPS_PER_CALL = 8  # decode steps on device between two looks at the rows


@dataclasses.dataclass(frozen=True)
class Answer:
    """One finished request.

    Attributes:
      text: the answer without its end token.
      token_ids: the answer's tokens, the end token included.
      finish_reason: "stop" (end token), "length" (limit used up) or "error".
      prompt_tokens: tokens of the prompt.
      completion_tokens: tokens of the answer.
      steps: target passes that decoded it, the prefill not counted.
      kappa: tokens committed per pass, (completion_tokens - 1) / steps: the first token comes from the prefill.
      accepted_per_position: how often each of the k drafts of a step was accepted and committed.
      error: why, when finish_reason is "error".
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    steps: int
    kappa: float
    accepted_per_position: list[int]
    error: str | None = None

    @classmethod
    def failed(cls, reason: str, prompt_tokens: int = 0) -> Answer:
        """A request that was not run."""
        return cls("", [], "error", prompt_tokens, 0, 0, 0.0, [], reason)


class Rows(NamedTuple):
    """What the host sees of a batch between two calls; numpy, the fields of `DecodeState`."""

    output: np.ndarray
    emitted: np.ndarray
    done: np.ndarray
    steps: np.ndarray
    accepted: np.ndarray


def generate(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    sampling_params: SamplingParams = SamplingParams(),
    draft_length: int | None = None,
    batch_size: int = 8,
    raw: bool = False,
) -> list[Answer]:
    """Answers a list of prompts, in order.

    Args:
      lm: from `load`.
      prompts: user messages, put into the model's chat template, or plain text to continue with `raw`.
      sampling_params: how to sample; the answer of a prompt is a function of it and the prompt alone.
      draft_length: k, None for the automatic choice.
      batch_size: rows decoded together.
      raw: no chat template.

    Raises:
      UserError: a draft length out of range, or no chat template.
    """
    token_ids = [encode_prompt(lm, [prompt], raw) for prompt in prompts]
    finished = generate_ids(lm, token_ids, sampling_params, draft_length=draft_length, batch_size=batch_size, raw=raw)
    answers = dict(finished)
    return [answers[i] for i in range(len(prompts))]


def encode_prompt(lm: LanguageModel, turns: Sequence[str], raw: bool) -> list[int]:
    """Token ids of a dialogue whose turns alternate between user and assistant, the last one the user's."""
    if raw:
        return lm.tokenizer.encode("".join(turns))
    roles = ("user", "assistant")
    return lm.tokenizer.chat([{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)])


def encode_turn(
    lm: LanguageModel, c: Conversation, turn: int, texts: Mapping[tuple[str, int], str], raw: bool
) -> list[int]:
    """Token ids of a conversation up to one of its turns, with the answers (id, turn) -> text to those before.

    Raises:
      UserError: one of these is missing, or no chat template.
    """
    turns = [c.turns[0]]
    for i in range(turn):
        if (c.id, i) not in texts:
            raise UserError(f"turn {turn} was not asked, as turn {i} has no answer")
        turns += [texts[c.id, i], c.turns[i + 1]]
    return encode_prompt(lm, turns, raw)


def answer_row(c: Conversation, turn: int, answer: Answer) -> dict[str, Any]:
    """The row of an answer file."""
    row = {"id": c.id, "prompt": c.turns[turn], **dataclasses.asdict(answer)}
    if answer.error is None:
        del row["error"]
    return row | ({"turn": turn} if len(c.turns) > 1 else {})


def check_draft_length(lm: LanguageModel, draft_length: int | None) -> None:
    """Raises UserError for a k that the head does not have; None, the automatic choice, always fits."""
    longest = lm.model.max_draft_length
    if draft_length is not None and not 0 <= draft_length <= longest:
        with_head = f"this draft head has {longest} slots" if longest else "there is no draft head to draft with"
        raise UserError(f"draft length {draft_length} is out of range: {with_head}, so give 0 to {longest}")


def job_shape(
    prompt_lengths: Sequence[int], max_new_tokens: int, *, batch_size: int, window: int, context: int
) -> Shape:
    """The bucketed shape that serves all prompts of a job with one set of compiled programs.

    Args:
      prompt_lengths: in tokens.
      window: W.
      context: the most positions a row may use; positions beyond it are for the window alone.
    """
    longest = max(prompt_lengths, default=1)
    rows = 1
    while rows < min(batch_size, len(prompt_lengths)):
        rows *= 2
    rows = min(rows, batch_size)
    positions = min(bucket(longest, 64) + bucket(max_new_tokens), context)
    middle = sorted(prompt_lengths)[len(prompt_lengths) // 2] if prompt_lengths else 1
    # A chunk is read whole whatever it holds, so a long prompt should not pad all others to its length, but take a few.
    chunk = min(max(bucket(middle, 32), bucket(longest, 64) // 4), 256)
    return Shape(rows=rows, window=window, chunk=chunk, positions=positions + window)


def generate_ids(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    *,
    draft_length: int | None = None,
    batch_size: int = 8,
    shape: Shape | None = None,
    raw: bool = False,
    on_rows: Callable[[Sequence[int], Rows], None] = lambda index, rows: None,
) -> Iterator[tuple[int, Answer]]:
    """Answers prompts of token ids, batch by batch; plain decoding, k = 0 in a window of one, runs without the head.

    Args:
      prompts: token ids each; a prompt that leaves no room for an answer gets finish_reason "error", the others go on.
      sampling_params: for all of them.
      draft_length: k, None for the automatic choice.
      batch_size: rows decoded together.
      shape: the compiled shape; None buckets the job's own. A fixed one makes bfloat16 answers bitwise the same at
        every k, batch fill and prompt length ("strict", README: the lossless contract).
      raw: the answers continue the prompts' text, so their first words keep the space before them.
      on_rows: called with the prompts' indices and their rows after every few steps.

    Yields:
      (index, Answer), as batches finish.

    Raises:
      UserError: a draft length out of range.
    """
    check_draft_length(lm, draft_length)
    lm = lm.sampling_with(sampling_params)
    context = lm.config.context if shape is None else shape.positions - shape.window
    fits = []
    for i, prompt in enumerate(prompts):
        reason = misfit(len(prompt), context)
        if reason is None:
            fits.append(i)
        else:
            yield i, Answer.failed(reason, len(prompt))
    if not fits:
        return
    lengths = [len(prompts[i]) for i in fits]

    def shape_of(k: int) -> Shape:
        return shape or job_shape(
            lengths, sampling_params.max_new_tokens, batch_size=batch_size, window=k + 1, context=context
        )

    k = auto_draft_length.choose(lm, shape_of, sampling_params) if draft_length is None else draft_length
    taken = shape_of(k)
    lm = lm.in_window(taken.window)
    for begin in range(0, len(fits), taken.rows):
        indices = fits[begin : begin + taken.rows]
        for rows in run_batch(lm, [prompts[i] for i in indices], sampling_params, taken, k):
            on_rows(indices, rows)
        for row, i in enumerate(indices):
            yield i, _answer(lm, prompts[i], rows, row, k, raw)


def run_batch(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    shape: Shape,
    draft_length: int,
) -> Iterator[Rows]:
    """Decodes up to B prompts in one batch and shows its rows after the prefill and after every few steps."""
    state = start_batch(lm, prompts, sampling_params, shape, draft_length)
    steps = jnp.int32(STEPS_PER_CALL)
    while True:
        rows = Rows(*jax.device_get(tuple(getattr(state, field) for field in Rows._fields)))
        yield rows
        if rows.done.all():
            return
        state = decode.jit_run(lm.model, lm.params, state, steps, draft_length=draft_length)


def start_batch(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    shape: Shape,
    draft_length: int,
) -> decode.DecodeState:
    """Reads up to B prompts: the state that `decode.jit_run` goes on from."""
    columns = -(-(shape.positions - shape.window) // shape.chunk) * shape.chunk
    tokens = np.zeros((shape.rows, columns), np.int32)
    lengths = np.zeros(shape.rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    return decode.jit_start(
        lm.model,
        lm.params,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        sampling.stack([sampling_params] * shape.rows),
        # A row near the context's end stops there.
        jnp.asarray(
            np.minimum(sampling_params.max_new_tokens, shape.positions - shape.window - lengths).astype(np.int32)
        ),
        shape=shape,
        max_new_tokens=shape.new_tokens_bucket(sampling_params.max_new_tokens),
        draft_length=draft_length,
    )


def misfit(length: int, context: int) -> str | None:
    """Why a prompt of so many tokens cannot be answered, None if it can."""
    if length == 0:
        return "the prompt is empty"
    if length >= context:
        return f"the prompt has {length} tokens, but the context holds {context}: shorten it"
    return None


def _answer(lm: LanguageModel, prompt: Sequence[int], rows: Rows, row: int, draft_length: int, raw: bool) -> Answer:
    ids = rows.output[row, : rows.emitted[row]].tolist()
    steps = int(rows.steps[row])
    return Answer(
        text=lm.tokenizer.decode(ids, prompt if raw else ()),
        token_ids=ids,
        finish_reason="stop" if ids and ids[-1] in lm.config.eos_ids else "length",
        prompt_tokens=len(prompt),
        completion_tokens=len(ids),
        steps=steps,
        kappa=round((len(ids) - 1) / steps, 4) if steps else 1.0,
        accepted_per_position=rows.accepted[row, :draft_length].tolist(),
    )
