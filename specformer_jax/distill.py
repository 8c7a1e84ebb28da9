"""Self-distillation: prompts -> the target's own answers, in resumable shards split over hosts."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specformer_jax import auto, decode, sampling
from specformer_jax.config import SamplingParams, Shape, UserError, bucket
from specformer_jax.data import META
from specformer_jax.loading import LanguageModel
from specformer_jax.train_config import DistillConfig


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
            raise UserError(f'{where}: there is no "prompt", "turns" or "messages" with text in it')
        name = str(row.get("id", row.get("prompt_id", number)))
        if name in seen:
            raise UserError(f"{where}: the id {name!r} stands there for the second time")
        seen.add(name)
        prompts.append(Prompt(name, messages))
    if not prompts:
        raise UserError(f"there are no prompts in {source}")
    return prompts


def _read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
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
    kept = []
    for message in row.get("messages") or ():
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
    process_index: int = 0,
    process_count: int = 1,
    report: Callable[[str], None] = print,
) -> int:
    """Writes shards of answers that are not there yet; a killed run loses at most the batch in flight.

    Shard s holds the prompts s * shard_size ...; process p makes the shards with s % process_count == p. Finished
    batches of an unfinished shard are kept in a .part file.

    Args:
      lm: the target; with a head the answers are made by speculative decoding where it pays (`auto.choose`), token for
        token the same.
      folder: of the shards.
      report: gets one line a batch.

    Returns:
      Answer tokens written.

    Raises:
      UserError: the folder cannot be written, or holds shards of another target.
    """
    folder = Path(folder)
    written = 0
    begun = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_meta(folder, lm, config)
        shards = -(-len(prompts) // config.shard_size)
        for shard in range(process_index, shards, process_count):
            final = folder / f"shard-{shard:05d}.jsonl"
            if final.exists():
                continue
            part = final.with_suffix(".part")
            mine = prompts[shard * config.shard_size : (shard + 1) * config.shard_size]
            done = _keep_whole_lines(part)
            for batch in _batches(lm, [prompt for prompt in mine if prompt.id not in done], config):
                rows = _answer(lm, batch, config)
                with part.open("a", encoding="utf-8") as out:
                    out.write("".join(json.dumps(row) + "\n" for row in rows))
                    out.flush()
                    os.fsync(out.fileno())
                written += sum(len(row["response_ids"]) for row in rows)
                rate = written / (time.perf_counter() - begun)
                report(f"shard {shard + 1}/{shards}: {written} answer tokens, {rate:.0f} tokens/s")
            part.touch()
            part.replace(final)
    except OSError as error:
        raise UserError(f"answers cannot be written to {folder}: {error}") from error
    return written


def _check_meta(folder: Path, lm: LanguageModel, config: DistillConfig) -> None:
    file = folder / META
    if file.exists():
        stored = json.loads(file.read_text()).get("tokenizer")
        if stored != lm.tokenizer.fingerprint:
            raise UserError(f"{folder} holds answers made with tokenizer {stored}, the target's is"
                            f" {lm.tokenizer.fingerprint}: choose another folder")  # fmt: skip
        return
    meta = {"target": lm.name, "tokenizer": lm.tokenizer.fingerprint, "temperatures": list(config.temperatures)}
    file.write_text(json.dumps(meta) + "\n")


def _keep_whole_lines(part: Path) -> set[str]:
    """Cuts a line that a killed run left half-written; the ids of the rows before it."""
    if not part.exists():
        return set()
    whole = [line for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    part.write_bytes(b"".join(whole))
    return {json.loads(line)["id"] for line in whole}


def _batches(lm: LanguageModel, prompts: Sequence[Prompt], config: DistillConfig):
    """Prompts of like length together, so that little of a batch is padding; (prompt, ids) pairs."""
    encoded = [(prompt, lm.tokenizer.chat(list(prompt.messages))) for prompt in prompts]
    encoded = [pair for pair in encoded if len(pair[1]) <= config.max_prompt_tokens]
    encoded.sort(key=lambda pair: len(pair[1]))
    for begin in range(0, len(encoded), config.batch_size):
        yield encoded[begin : begin + config.batch_size]


def _draft_length(lm: LanguageModel, config: DistillConfig) -> int:
    """k of the whole job, timed once at its longest prompts."""
    longest = bucket(config.max_prompt_tokens, 64)
    params = SamplingParams(temperature=max(config.temperatures), max_new_tokens=config.max_new_tokens)
    return auto.choose(lm, lambda k: _shape(config, longest, k), params)


def _shape(config: DistillConfig, longest: int, k: int) -> Shape:
    slots = longest + config.max_new_tokens + k + 1
    return Shape(rows=config.batch_size, window=k + 1, chunk=min(longest, 64), slots=slots)


def _answer(lm: LanguageModel, batch, config: DistillConfig) -> list[dict[str, Any]]:
    """One batch of answers as rows; every row has its own temperature and seed."""
    k = _draft_length(lm, config)
    lm = lm.in_window(k + 1)
    longest = bucket(max(len(ids) for _, ids in batch), 64)
    rows, shape = config.batch_size, _shape(config, longest, k)
    columns = -(-longest // shape.chunk) * shape.chunk
    tokens, lengths = np.zeros((rows, columns), np.int32), np.zeros(rows, np.int32)
    asked = []
    for row, (prompt, ids) in enumerate(batch):
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        asked.append(
            SamplingParams(
                temperature=temperature_of(prompt.id, config),
                seed=seed_of(prompt.id, config),
                max_new_tokens=config.max_new_tokens,
            )
        )
    asked += [SamplingParams()] * (rows - len(asked))
    state = decode.jit_generate(
        lm.model,
        lm.params,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        sampling.stack(asked),
        jnp.full(rows, config.max_new_tokens, jnp.int32),
        shape=shape,
        room=config.max_new_tokens,
        draft_length=k,
    )
    output, emitted = jax.device_get((state.output, state.emitted))
    return [
        {
            "id": prompt.id,
            "temperature": params.temperature,
            "seed": params.seed,
            "prompt_ids": ids,
            "response_ids": output[row, : emitted[row]].tolist(),
        }
        for row, ((prompt, ids), params) in enumerate(zip(batch, asked, strict=False))
    ]
