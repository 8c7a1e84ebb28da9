"""Self-distillation: prompts -> the target's own answers, in resumable shards split over hosts."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import os
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from specformer_jax.batch.conversations import Conversation
from specformer_jax.batch.generation import Answer, encode_turn
from specformer_jax.batch.omissions import Omission
from specformer_jax.config import SamplingParams
from specformer_jax.engine import Engine, answer_file
from specformer_jax.engine.config import EngineConfig
from specformer_jax.engine.request import Request
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.training.config import DistillConfig
from specformer_jax.training.distillation.answer_shards import Shard, check_folder
from specformer_jax.training.report.progress import AnswerProgress

SAMPLE = "/sample-"  # between the id of a dialogue that is answered several times and the number of the answer


def temperature_of(dialogue: str, config: DistillConfig) -> float:
    """The temperature of a dialogue's answers, by its id and the seed alone; only a first sample may have 0."""
    sampled = [temperature for temperature in config.temperatures if temperature]
    choices = sampled if SAMPLE in dialogue and sampled else config.temperatures
    return choices[_hash(dialogue, config.seed) % len(choices)]


def with_samples(conversations: Sequence[Conversation], config: DistillConfig) -> list[Conversation]:
    """Each dialogue as often as it is to be answered, under an id for each.

    >>> asked = [Conversation("a", ("?",)), Conversation("b", ("!",))]
    >>> [c.id for c in with_samples(asked, DistillConfig((0.8,), samples=2))]
    ['a', 'b', 'a/sample-1', 'b/sample-1']
    """
    further = [dataclasses.replace(c, id=f"{c.id}{SAMPLE}{i}") for i in range(1, config.samples) for c in conversations]
    return [*conversations, *further]


def seed_of(prompt_id: str, config: DistillConfig, turn: int = 0) -> int:
    """The sampling seed of the answer to a turn of a dialogue."""
    return _hash(f"{prompt_id}#{turn}" if turn else prompt_id, config.seed + 1) % 2**32


def _hash(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:8], "little")


def distill(
    lm: LanguageModel,
    conversations: Sequence[Conversation],
    config: DistillConfig,
    folder: str | os.PathLike,
    *,
    raw: bool = False,
    mesh: Mesh | None = None,
    process_index: int = 0,
    process_count: int = 1,
    progress: bool = True,
    programs: str | None = None,
) -> tuple[int, list[Omission]]:
    """Writes the answers that are not there yet, in shards; a killed run loses no finished one.

    Every turn of the user's is asked after the target's own answers to those before, as `generate` asks it. Shard s
    holds the dialogues s * shard_size ..., their further samples behind all of them; process p makes the shards with
    s % process_count == p. An engine answers them, so that no row waits for the longest answer of a batch.

    Args:
      lm: the target; with a head the engine's planner drafts where it pays, and the answers are token for token the
        same.
      conversations: what the target shall answer.
      config: how it answers.
      folder: where the shards go; answers of an unfinished one are kept in a .part file.
      raw: whether the turns are continued as plain text, without the chat template.
      mesh: the mesh of this process's devices that `lm` was placed on.
      process_index: which of the processes that share the dialogues this is.
      process_count: how many processes share the dialogues.
      progress: whether to draw a progress bar, or to print lines where there is no terminal.
      programs: a folder that keeps the engine's compiled programs between starts, or None.

    Returns:
      How many answer tokens were written, and the turns of this process's dialogues that were not asked.

    Raises:
      UserError: no turn can be asked (then nothing is written); the folder cannot be written, or holds answers to other
        prompts or made in another way: of another target, say, or seed; the target or the device failed at an answer.
    """
    folder, conversations = Path(folder), with_samples(conversations, config)
    count = -(-len(conversations) // config.shard_size)
    shards = range(process_index, count, process_count)
    work = _Work(lm, config, raw)
    work.check_any_fits(conversations)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_folder(folder, _meta(lm, config), count)
        questions = work.questions(conversations, folder, shards)
        first = next(questions, None)
        if first is None:
            return 0, work.omissions
        lm = lm.sampling_with(SamplingParams())  # no answer is asked for with top-k, top-p or min-p
        asked = [c for s in shards for c in conversations[s * config.shard_size : (s + 1) * config.shard_size]]
        shown = AnswerProgress("distill", sum(len(c.turns) for c in asked), enabled=progress)
        with contextlib.closing(shown), Engine(lm, _engine_config(lm, config, programs), mesh=mesh) as engine:
            written = _answer(engine, work, itertools.chain([first], questions), shown)
        return written, work.omissions
    except OSError as error:
        raise UserError(f"answers cannot be written to {folder}: {error}") from error


def _engine_config(lm: LanguageModel, config: DistillConfig, programs: str | None) -> EngineConfig:
    context = min(config.max_prompt_tokens + config.max_new_tokens, lm.config.context)
    # Rows stay full if a prompt of the longest kind can be read for each that an answer leaves, after 64 steps say.
    chunk = max(128, -(-config.batch_size * config.max_prompt_tokens // 64))
    return EngineConfig(config.batch_size, context, chunk=chunk, max_queue=2 * config.batch_size, programs=programs)


@dataclasses.dataclass
class _Dialogue:
    """A dialogue that is being answered, in the shard that it belongs to; `answers` are the texts so far."""

    shard: Shard
    conversation: Conversation
    answers: list[str] = dataclasses.field(default_factory=list)


class _Question(NamedTuple):
    """The next turn of a dialogue, and the token ids of all that was said up to it."""

    dialogue: _Dialogue
    ids: list[int]


class _Work:
    """What is asked, and what is left out.

    Attributes:
      omissions: rows and turns that are not asked.
      answers: how many answers are there, of before or of now.
      left_out: how many will not come.
    """

    def __init__(self, lm: LanguageModel, config: DistillConfig, raw: bool):
        self.config, self.raw, self.omissions = config, raw, list[Omission]()
        self.answers = self.left_out = 0
        self._lm = lm
        self._longest = min(config.max_prompt_tokens, lm.config.context - 1)

    def check_any_fits(self, conversations: Sequence[Conversation]) -> None:
        """Raises UserError if no dialogue can be asked its first turn."""
        reasons = set()
        for c in conversations:
            ids, reason = self._encode(c, [])
            if ids is not None:
                return
            reasons.add(reason)
        raise UserError(f"there is nothing to answer: every prompt is left out ({'; '.join(sorted(reasons))})")

    def questions(
        self, conversations: Sequence[Conversation], folder: Path, shards: Sequence[int]
    ) -> Iterator[_Question]:
        """The first turn of each dialogue that is not answered yet, shard by shard."""
        for number in shards:
            asked = conversations[number * self.config.shard_size : (number + 1) * self.config.shard_size]
            shard = Shard(folder / f"shard-{number:05d}.jsonl", [c.id for c in asked])
            dialogues = [_Dialogue(shard, c) for c in asked]
            found = [self.next_question(dialogue) for dialogue in dialogues]
            shard.check_all_found()
            for dialogue, question in zip(dialogues, found, strict=True):
                if question is None:
                    shard.end(dialogue.conversation.id)
                else:
                    yield question

    def next_question(self, dialogue: _Dialogue) -> _Question | None:
        """The next turn that has no answer; None where all have one, or where it cannot be asked."""
        c = dialogue.conversation
        while (turn := len(dialogue.answers)) < len(c.turns):
            ids, reason = self._encode(c, dialogue.answers)
            if ids is None:
                part = "turn" if turn else "row"
                self.left_out += len(c.turns) - turn
                self.omissions.append(Omission(c.id, part, len(c.turns) - turn if turn else 1, reason))
                return None
            row = dialogue.shard.find(c.id, turn, ids)
            if row is None:
                return _Question(dialogue, ids)
            self.take(dialogue, ids, row["response_ids"])
        return None

    def take(self, dialogue: _Dialogue, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """The answer to a dialogue's next turn becomes part of it."""
        self.answers += 1
        dialogue.answers.append(self._lm.tokenizer.decode(answer, prompt if self.raw else ()))

    def _encode(self, c: Conversation, answers: Sequence[str]) -> tuple[list[int] | None, str]:
        """The token ids up to the turn after these answers; None and the reason where it cannot be asked."""
        try:
            ids = encode_turn(self._lm, c, answers, self.raw)
        except UserError as error:
            return None, str(error)
        if len(ids) > self._longest:
            return None, f"a prompt of more than {self._longest} tokens (distill.max_prompt_tokens, or the context)"
        return (ids, "") if ids else (None, "a prompt without a token")


def _answer(engine: Engine, work: _Work, questions: Iterator[_Question], shown: AnswerProgress) -> int:
    """Asks all questions, always some more than there are rows, and adds the answers to their shards."""
    config = work.config
    ended: queue.SimpleQueue[tuple[tuple[_Question, SamplingParams], Answer]] = queue.SimpleQueue()
    later: collections.deque[_Question] = collections.deque()  # the next turns of dialogues that were just answered

    def ask_next() -> int:
        question = later.popleft() if later else next(questions, None)
        if question is None:
            return 0
        name, turn = question.dialogue.conversation.id, len(question.dialogue.answers)
        sampling_params = SamplingParams(
            temperature=temperature_of(name, config),
            seed=seed_of(name, config, turn),
            max_new_tokens=config.max_new_tokens,
        )
        request = Request(tuple(question.ids), sampling_params, raw=work.raw, streams=False)
        answer_file.ask(engine, request, (question, sampling_params), ended)
        return 1

    written = 0
    unanswered = sum(ask_next() for _ in range(2 * config.batch_size))
    while unanswered:
        shown.show(work.answers, engine.stats().completion_tokens, work.left_out)
        try:
            (question, sampling_params), answer = ended.get(timeout=1.0)
        except queue.Empty:  # look again at how far those are that go on
            continue
        dialogue, c = question.dialogue, question.dialogue.conversation
        if answer.finish_reason not in ("stop", "length"):
            raise UserError(
                f"{c.id} was not answered: {answer.error or answer.finish_reason}; the answers so far are kept, and the"
                " same command goes on"
            )
        row = {
            "id": c.id,
            "temperature": sampling_params.temperature,
            "seed": sampling_params.seed,
            "prompt_ids": question.ids,
            "response_ids": answer.token_ids,
        }
        turn = len(dialogue.answers)
        dialogue.shard.add(row | ({"turn": turn} if turn else {}))
        work.take(dialogue, question.ids, answer.token_ids)
        following = work.next_question(dialogue)
        if following is None:
            dialogue.shard.end(c.id)
        else:
            later.append(following)
        unanswered += ask_next() - 1
        written += answer.completion_tokens
    shown.show(work.answers, written, work.left_out)
    return written


def _meta(lm: LanguageModel, config: DistillConfig) -> dict[str, Any]:
    """What the answers depend on; drafts and batches change no answer."""
    meta: dict[str, Any] = {"target": lm.name, "tokenizer": lm.tokenizer.fingerprint, "answers": "target"}
    meta["temperatures"] = list(config.temperatures)
    return meta | {name: getattr(config, name) for name in ("max_new_tokens", "seed", "shard_size")}
