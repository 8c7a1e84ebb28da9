"""Generating text for any number of prompts: one job of batches, all in one compiled shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from specformer_jax.batch import auto_draft_length
from specformer_jax.batch.conversations import Conversation
from specformer_jax.batch.row_batch import Rows, run_batch
from specformer_jax.config import SamplingParams, Shape, bucket
from specformer_jax.decoding.pass_counts import PassCounts
from specformer_jax.decoding.state import BROKEN_REASON
from specformer_jax.decoding.verification.kind import EXACT
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Answer:
    """One finished request.

    Attributes:
      text: the answer without its end token.
      token_ids: the answer's tokens, the end token included.
      finish_reason: "stop" (the answer has its end token), "length" (its limit is used up) or "error".
      prompt_tokens: how many tokens the prompt has.
      completion_tokens: how many tokens the answer has.
      steps: how many passes of the target decoded the answer; those that read the prompt are not counted.
      kappa: how many tokens a pass committed, (completion_tokens - 1) / steps: reading the prompt gives the first one.
      accepted_per_position: how often each of the k drafts of a step was accepted and committed.
      error: what went wrong, where finish_reason is "error".
      verification: how the drafts were verified; any but "exact" says in its name what it does not keep.
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
    verification: str = EXACT

    @classmethod
    def failed(cls, reason: str, prompt_tokens: int = 0) -> Answer:
        """The answer to a request that was not run."""
        return cls("", [], "error", prompt_tokens, 0, 0, 0.0, [], reason)

    @property
    def passes(self) -> PassCounts:
        """The counts of the answer's decode passes."""
        return PassCounts.of(self.completion_tokens, self.steps, self.accepted_per_position)


class JobPlan(NamedTuple):
    """What a job decodes with.

    Attributes:
      draft_length: how many drafts a step has, k.
      shape: the compiled shape of every batch.
      lm: the model as the job uses it, without its drafter where the shape has no place for drafts.
    """

    draft_length: int
    shape: Shape
    lm: LanguageModel


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
      lm: the model, as `load` returns it.
      prompts: user messages, put into the model's chat template, or plain text to continue with `raw`.
      sampling_params: how to sample; the answer of a prompt is a function of it and the prompt alone.
      draft_length: how many drafts a step has; None chooses by itself.
      batch_size: how many rows are decoded together.
      raw: whether prompts are continued as plain text, without the chat template.

    Raises:
      UserError: the draft length is out of range, or the model has no chat template.
    """
    token_ids = [encode_prompt(lm, [prompt], raw) for prompt in prompts]
    finished = generate_ids(lm, token_ids, sampling_params, draft_length=draft_length, batch_size=batch_size, raw=raw)
    answers = dict(finished)
    return [answers[i] for i in range(len(prompts))]


def encode_prompt(lm: LanguageModel, turns: Sequence[str], raw: bool, system: str | None = None) -> list[int]:
    """Token ids of a dialogue whose turns alternate between user and assistant, the last one the user's.

    Raises:
      UserError: the model has no chat template, or plain text shall have a system prompt.
    """
    if raw:
        if system is not None:
            raise UserError("plain text has no place for a system prompt: leave it or --raw out")
        return lm.tokenizer.encode("".join(turns))
    return lm.tokenizer.chat(messages(turns, system))


def messages(turns: Sequence[str], system: str | None = None) -> list[dict[str, str]]:
    """The messages of a dialogue whose turns alternate between user and assistant."""
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def encode_turn(lm: LanguageModel, c: Conversation, answers: Sequence[str], raw: bool) -> list[int]:
    """Token ids of a conversation up to the turn that comes after these answers, which stand in it.

    Raises:
      UserError: as `encode_prompt`.
    """
    turns = [c.turns[0]]
    for i, answer in enumerate(answers):
        turns += [answer, c.turns[i + 1]]
    return encode_prompt(lm, turns, raw, c.system)


def answers_before(c: Conversation, turn: int, texts: Mapping[tuple[str, int], str]) -> list[str]:
    """The answers to the turns before one, of those that there are by (id, turn).

    Raises:
      UserError: one of them is missing.
    """
    for i in range(turn):
        if (c.id, i) not in texts:
            raise UserError(f"turn {turn} was not asked, as turn {i} has no answer")
    return [texts[c.id, i] for i in range(turn)]


def answer_row(c: Conversation, turn: int, answer: Answer) -> dict[str, Any]:
    """The row of an answer file."""
    row = {"id": c.id, "prompt": c.turns[turn], **dataclasses.asdict(answer)}
    if c.system is not None:
        row["system"] = c.system
    if answer.error is None:
        del row["error"]
    if answer.verification == EXACT:
        del row["verification"]
    return row | ({"turn": turn} if len(c.turns) > 1 else {})


def check_draft_length(lm: LanguageModel, draft_length: int | None) -> None:
    """Raises UserError for more drafts than the drafter makes; None, the automatic choice, always fits."""
    longest = lm.model.max_draft_length
    if draft_length is not None and not 0 <= draft_length <= longest:
        with_head = f"this draft head has {longest} slots" if longest else "there is no draft head to draft with"
        raise UserError(f"draft length {draft_length} is out of range: {with_head}, so give 0 to {longest}")


def job_shape(
    prompt_lengths: Sequence[int], max_new_tokens: int, *, batch_size: int, window: int, context: int
) -> Shape:
    """The bucketed shape that serves all prompts of a job, so that it is compiled for once.

    Args:
      prompt_lengths: how many tokens each prompt has.
      max_new_tokens: the most tokens of an answer.
      batch_size: the most rows decoded together.
      window: one more than the drafts of a row and step.
      context: the most positions that prompt and answer of a row may take.
    """
    longest = max(prompt_lengths, default=1)
    rows = 1
    while rows < min(batch_size, len(prompt_lengths)):
        rows *= 2
    rows = min(rows, batch_size)
    positions = min(bucket(longest, 64) + bucket(max_new_tokens), context)
    middle = sorted(prompt_lengths)[len(prompt_lengths) // 2] if prompt_lengths else 1
    # A step is computed whole whatever it reads, so a long prompt should not pad all others to its length.
    chunk = min(max(bucket(middle, 32), bucket(longest, 64) // 4), 256)
    return Shape(rows=rows, window=window, chunk=chunk, positions=positions)


def plan_job(
    lm: LanguageModel,
    prompt_lengths: Sequence[int],
    sampling_params: SamplingParams,
    *,
    draft_length: int | None,
    batch_size: int,
    shape: Shape | None = None,
) -> JobPlan:
    """Settles with how many drafts a job decodes, in which shape, and what of the model that needs.

    Args:
      lm: the model, as `load` returns it.
      prompt_lengths: how many tokens each prompt has; all fit the context.
      sampling_params: how the answers are sampled.
      draft_length: k, which `check_draft_length` has passed; None chooses by itself.
      batch_size: the most rows decoded together.
      shape: the compiled shape; None buckets the job's own.
    """
    lm = lm.sampling_with(sampling_params)

    def shape_of(k: int) -> Shape:
        return shape or job_shape(
            prompt_lengths,
            sampling_params.max_new_tokens,
            batch_size=batch_size,
            window=k + 1,
            context=lm.config.context,
        )

    k = auto_draft_length.choose(lm, shape_of, sampling_params) if draft_length is None else draft_length
    taken = shape_of(k)
    return JobPlan(k, taken, lm.in_window(taken.window))


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
    """Answers prompts of token ids, batch by batch; plain decoding in a shape without drafts runs without the head.

    Args:
      lm: the model, as `load` returns it.
      prompts: the token ids of each prompt; one that leaves no token for an answer gets finish_reason "error", the
        others go on.
      sampling_params: how every answer is sampled.
      draft_length: how many drafts a step has; None chooses by itself.
      batch_size: the most rows decoded together.
      shape: the compiled shape; None buckets the job's own. A fixed one makes bfloat16 answers bitwise the same at
        every k, batch fill and prompt length ("strict", README: the lossless contract).
      raw: the answers continue the prompts' text, so their first words keep the space before them.
      on_rows: is called with the indices of a batch's prompts and its rows after every few steps.

    Yields:
      (index, Answer) of each prompt, as batches finish.

    Raises:
      UserError: the draft length is out of range.
    """
    check_draft_length(lm, draft_length)
    context = lm.config.context if shape is None else shape.positions
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
    k, shape, lm = plan_job(lm, lengths, sampling_params, draft_length=draft_length, batch_size=batch_size, shape=shape)
    for begin in range(0, len(fits), shape.rows):
        indices = fits[begin : begin + shape.rows]
        for rows in run_batch(lm, [prompts[i] for i in indices], sampling_params, shape, k):
            on_rows(indices, rows)
        for row, i in enumerate(indices):
            yield i, _answer(lm, prompts[i], rows, row, k, raw)


def misfit(length: int, context: int) -> str | None:
    """Why a prompt of so many tokens cannot be answered, None if it can."""
    return "the prompt is empty" if length == 0 else too_long(length, context)


def too_long(length: int, context: int) -> str | None:
    """Why a prompt of so many tokens leaves none for an answer, None if it does not."""
    if length >= context:
        return f"the prompt has {length} tokens, but the context holds {context}: shorten it"
    return None


def _answer(lm: LanguageModel, prompt: Sequence[int], rows: Rows, row: int, draft_length: int, raw: bool) -> Answer:
    if rows.is_broken(row):
        return Answer.failed(BROKEN_REASON, len(prompt))
    ids = rows.answer(row)
    steps = int(rows.steps[row])
    accepted = rows.accepted[row, :draft_length].tolist()
    return Answer(
        text=lm.tokenizer.decode(ids, prompt if raw else ()),
        token_ids=ids,
        finish_reason="stop" if ids and ids[-1] in lm.config.eos_ids else "length",
        prompt_tokens=len(prompt),
        completion_tokens=len(ids),
        steps=steps,
        kappa=round(PassCounts.of(len(ids), steps, accepted).kappa, 4),
        accepted_per_position=accepted,
        verification=lm.model.verification.name,
    )
