"""Self-distillation: prompts -> the target's own answers, in resumable shards split over hosts."""

from __future__ import annotations

import hashlib
import itertools
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from specformer_jax import files
from specformer_jax.batch import prompt_files
from specformer_jax.batch.generation import Answer
from specformer_jax.config import SamplingParams
from specformer_jax.engine import Engine, answer_file
from specformer_jax.engine.config import EngineConfig
from specformer_jax.engine.request import Request
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.training.config import DistillConfig
from specformer_jax.training.data.documents import META, read_meta
from specformer_jax.training.distillation.answer_shards import Shard, lines


class Prompt(NamedTuple):
    """A dialogue that the target shall answer.

    Attributes:
      id: its name, unique within the run.
      messages: what was said so far, {"role", "content"} each; the last message is the user's.
    """

    id: str
    messages: tuple[dict[str, str], ...]


def read_prompts(source: str) -> list[Prompt]:
    """Reads a JSONL file, or a Hugging Face dataset id such as "HuggingFaceH4/ultrachat_200k" with its split
    "train_sft" after a colon.

    A row has `prompt`, or `turns` (the first is taken), or `messages` (up to the first user message).

    Raises:
      UserError: an unreadable or empty file, a row without a prompt, no network.
    """
    is_file = Path(source).exists() or source.endswith(".jsonl")
    objects = (fields for _, fields in prompt_files.read_objects(source)) if is_file else _read_hub(source)
    rows = ((f"{source}, row {number}", number, fields) for number, fields in enumerate(objects, 1))
    prompts = [
        Prompt(row.id, _messages(row)) for row in prompt_files.identified(rows, ("id", "prompt_id", "question_id"))
    ]
    if not prompts:
        raise UserError(f"there are no prompts in {source}")
    return prompts


def _read_hub(source: str) -> Iterator[dict[str, Any]]:
    name, _, split = source.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source} is no file; to read it from the Hub, pip install datasets") from error
    try:
        yield from datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"the dataset {source} cannot be read from the Hub: {error}") from error


def _messages(row: prompt_files.PromptRow) -> tuple[dict[str, str], ...]:
    """The dialogue up to the first user message."""
    messages = _first_messages(row.fields)
    if messages is None:
        raise UserError(f'{row.where}: give "prompt", "turns" or "messages" (of "role" and "content") with text in it')
    prompt_files.check_unicode(row.where, *(message["content"] for message in messages))
    return messages


def _first_messages(fields: dict[str, Any]) -> tuple[dict[str, str], ...] | None:
    prompt, turns, messages = fields.get("prompt"), fields.get("turns"), fields.get("messages")
    if isinstance(prompt, str) and prompt.strip():
        return ({"role": "user", "content": prompt},)
    if isinstance(turns, list) and turns and isinstance(turns[0], str):
        return ({"role": "user", "content": turns[0]},)
    kept: list[dict[str, str]] = []
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return None
        kept.append({"role": message["role"], "content": message["content"]})
        if message["role"] == "user":
            return tuple(kept)
    return None


def temperature_of(prompt_id: str, config: DistillConfig) -> float:
    """The temperature of a prompt's answer: a function of its id and the seed alone."""
    return config.temperatures[_hash(prompt_id, config.seed) % len(config.temperatures)]


def seed_of(prompt_id: str, config: DistillConfig) -> int:
    """The sampling seed of a prompt's answer."""
    return _hash(prompt_id, config.seed + 1) % 2**32


def _hash(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:8], "little")


def distill(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    config: DistillConfig,
    folder: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    process_index: int = 0,
    process_count: int = 1,
    report: Callable[[str], None] = print,
) -> int:
    """Writes the answers that are not there yet, in shards; a killed run loses no finished one.

    Shard s holds the prompts s * shard_size ...; process p makes the shards with s % process_count == p. An engine
    answers them, so that no row waits for the longest answer of a batch.

    Args:
      lm: the target; with a head the engine's planner drafts where it pays, and the answers are token for token the
        same.
      prompts: what the target shall answer.
      config: how it answers.
      folder: where the shards go; answers of an unfinished one are kept in a .part file.
      mesh: the mesh of this process's devices that `lm` was placed on.
      process_index: which of the processes that share the prompts this is.
      process_count: how many processes share the prompts.
      report: gets one line for every `batch_size` answers.

    Returns:
      How many answer tokens were written.

    Raises:
      UserError: the folder cannot be written, or holds answers to other prompts or made in another way: of another
        target, say, or seed.
    """
    folder = Path(folder)
    shards = range(process_index, -(-len(prompts) // config.shard_size), process_count)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_meta(folder, lm, config)
        questions = _questions(lm, prompts, config, folder, shards)
        first = next(questions, None)
        if first is None:
            return 0
        lm = lm.sampling_with(SamplingParams())  # no answer is asked for with top-k, top-p or min-p
        with Engine(lm, _engine_config(lm, config), mesh=mesh) as engine:
            return _answer(engine, itertools.chain([first], questions), config, report)
    except OSError as error:
        raise UserError(f"answers cannot be written to {folder}: {error}") from error


def _engine_config(lm: LanguageModel, config: DistillConfig) -> EngineConfig:
    context = min(config.max_prompt_tokens + config.max_new_tokens, lm.config.context)
    # Rows stay full if a prompt of the longest kind can be read for each that an answer leaves, after 64 steps say.
    chunk = max(128, -(-config.batch_size * config.max_prompt_tokens // 64))
    return EngineConfig(config.batch_size, context, chunk=chunk, max_queue=2 * config.batch_size)


class _Question(NamedTuple):
    """A prompt, its token ids, and the shard that its answer belongs to."""

    shard: Shard
    prompt: Prompt
    ids: list[int]


def _questions(
    lm: LanguageModel, prompts: Sequence[Prompt], config: DistillConfig, folder: Path, shards: Sequence[int]
) -> Iterator[_Question]:
    """What is not answered yet, shard by shard; prompts that are too long are left out."""
    longest = min(config.max_prompt_tokens, lm.config.context - 1)
    for number in shards:
        asked = prompts[number * config.shard_size : (number + 1) * config.shard_size]
        encoded = {prompt.id: _encode(lm, prompt) for prompt in asked}
        fitting = {name: ids for name, ids in encoded.items() if len(ids) <= longest}
        shard = Shard(folder / f"shard-{number:05d}.jsonl", fitting)
        for prompt in asked:
            if prompt.id in fitting and prompt.id not in shard:
                yield _Question(shard, prompt, fitting[prompt.id])


def _encode(lm: LanguageModel, prompt: Prompt) -> list[int]:
    try:
        return lm.tokenizer.chat(list(prompt.messages))
    except UserError as error:
        raise UserError(f"prompt {prompt.id!r}: {error}") from error


def _answer(
    engine: Engine, questions: Iterator[_Question], config: DistillConfig, report: Callable[[str], None]
) -> int:
    """Asks all questions, always some more than there are rows, and adds the answers to their shards."""
    ended: queue.SimpleQueue[tuple[tuple[_Question, SamplingParams], Answer]] = queue.SimpleQueue()

    def ask_next(some: int) -> int:
        asked = list(itertools.islice(questions, some))
        for question in asked:
            sampling_params = SamplingParams(
                temperature=temperature_of(question.prompt.id, config),
                seed=seed_of(question.prompt.id, config),
                max_new_tokens=config.max_new_tokens,
            )
            answer_file.ask(engine, Request(tuple(question.ids), sampling_params), (question, sampling_params), ended)
        return len(asked)

    begun = time.perf_counter()
    answers = written = 0
    unanswered = ask_next(2 * config.batch_size)
    while unanswered:
        (question, sampling_params), answer = ended.get()
        if answer.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"the engine failed at {question.prompt.id}: {answer.error or answer.finish_reason}")
        unanswered += ask_next(1) - 1
        question.shard.add(
            {
                "id": question.prompt.id,
                "temperature": sampling_params.temperature,
                "seed": sampling_params.seed,
                "prompt_ids": question.ids,
                "response_ids": answer.token_ids,
            }
        )
        answers, written = answers + 1, written + answer.completion_tokens
        if answers % config.batch_size == 0 or not unanswered:
            rate = written / (time.perf_counter() - begun)
            report(f"{question.shard.name}: {answers} answers, {written} answer tokens, {rate:.0f} tokens/s")
    return written


def _check_meta(folder: Path, lm: LanguageModel, config: DistillConfig) -> None:
    """Keeps in the folder what its answers depend on, or compares; drafts and batches change no answer."""
    meta: dict[str, Any] = {"target": lm.name, "tokenizer": lm.tokenizer.fingerprint}
    meta["temperatures"] = list(config.temperatures)
    meta |= {name: getattr(config, name) for name in ("max_new_tokens", "seed", "shard_size")}
    if not (folder / META).exists():
        files.write_whole(folder / META, lines([files.seal(meta)]))
        return
    stored = read_meta(folder)  # an earlier version kept fewer of them
    other = [f"{name} {stored[name]}, not {value}" for name, value in meta.items() if stored.get(name, value) != value]
    if other:
        raise UserError(f"{folder} holds answers made with {', and '.join(other)}: choose another folder")
