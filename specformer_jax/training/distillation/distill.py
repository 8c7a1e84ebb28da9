"""Self-distillation: prompts -> the target's own answers, in resumable shards split over hosts."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
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
      id: unique within the run.
      messages: {"role", "content"} each; the last one is the user's.
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
    rows = _read_jsonl(Path(source)) if Path(source).exists() or source.endswith(".jsonl") else _read_hub(source)
    prompts, seen = [], set()
    for number, row in enumerate(rows, 1):
        where = f"{source}, row {number}"
        messages = _messages(row)
        if messages is None:
            raise UserError(f'{where}: give "prompt", "turns" or "messages" (of "role" and "content") with text in it')
        name = str(row.get("id", row.get("prompt_id", row.get("question_id", number))))
        if name in seen:
            raise UserError(f"{where}: the id {name!r} stands there for the second time")
        seen.add(name)
        prompt_files.check_unicode(where, name, *(message["content"] for message in messages))
        prompts.append(Prompt(name, messages))
    if not prompts:
        raise UserError(f"there are no prompts in {source}")
    return prompts


def _read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    try:
        # splitlines() would also split at U+2028, which a JSON string may hold.
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{file}, line {number}: a row must be an object")
                yield row
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"the prompt file {file} cannot be read: {error}") from error


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


def _messages(row: dict[str, Any]) -> tuple[dict[str, str], ...] | None:
    if isinstance(row.get("prompt"), str) and row["prompt"].strip():
        return ({"role": "user", "content": row["prompt"]},)
    if isinstance(row.get("turns"), list) and row["turns"] and isinstance(row["turns"][0], str):
        return ({"role": "user", "content": row["turns"][0]},)
    kept, messages = [], row.get("messages")
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
    answers them, so that no slot waits for the longest answer of a batch.

    Args:
      lm: the target; with a head the engine's planner drafts where it pays, and the answers are token for token the
        same.
      folder: of the shards; answers of an unfinished one are kept in a .part file.
      mesh: of this process's devices, the one that `lm` was placed on.
      report: gets one line for as many answers as there are slots.

    Returns:
      Answer tokens written.

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
    found = EngineConfig(config.batch_size, context, max_queue=2 * config.batch_size, elastic=False)
    # Slots stay full if a prompt of the longest kind can be read for each that an answer leaves, after 64 steps say.
    chunks = -(-config.max_prompt_tokens // found.chunk)
    return dataclasses.replace(found, chunks_per_call=-(-config.batch_size * chunks // 64))


class _Question(NamedTuple):
    """A prompt, its tokens, and the shard that its answer belongs to."""

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
    """Asks all questions, always some more than there are slots, and adds the answers to their shards."""
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
        files.write_whole(folder / META, lines([meta]))
        return
    stored = read_meta(folder)  # an earlier version kept fewer of them
    other = [f"{name} {stored[name]}, not {value}" for name, value in meta.items() if stored.get(name, value) != value]
    if other:
        raise UserError(f"{folder} holds answers made with {', and '.join(other)}: choose another folder")
