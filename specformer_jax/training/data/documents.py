"""Self-distilled answers as documents: read from JSONL shards and checked, with what is known about their making."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specformer_jax import files
from specformer_jax.config import TargetConfig
from specformer_jax.errors import UserError, require

META = "distilled.json"  # beside the shards of `distill`: which target and tokenizer they belong to
TFDS_META = "metadata.json"  # the same beside dataset_info.json, where TFDS looks for it


class Document(NamedTuple):
    """One prompt and the target's answer.

    Attributes:
      id: the id that the prompt had in its prompt file.
      tokens: the prompt's token ids and then the answer's, int32.
      prompt: how many of these tokens are the prompt.
      temperature: the temperature that the answer was sampled at; 0 is greedy.
    """

    id: str
    tokens: np.ndarray
    prompt: int
    temperature: float


def read_shards(path: str | os.PathLike, vocab_size: int | None = None) -> list[Document]:
    """Reads a JSONL file (.gz too), or a directory of them.

    A row holds `prompt_ids` and `response_ids`, and may hold `id` and `temperature`.

    Args:
      path: the file or the directory.
      vocab_size: token ids must be below it.

    Raises:
      UserError: an unreadable, damaged or empty file, a row without an answer, ids that the target does not have.
    """
    path = Path(path)
    shards = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")]) if path.is_dir() else [path]
    documents = [document for shard in shards for document in _read_file(shard, vocab_size)]
    if not documents:
        raise UserError(f"the data in {path} is empty: `train.py distill` makes answers to train on")
    return documents


def _read_file(file: Path, vocab_size: int | None) -> Iterator[Document]:
    opener = gzip.open if file.name.endswith(".gz") else open
    try:
        files.check_digest(file)
        with opener(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse(f"{file}, line {number}", line, vocab_size)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"the data file {file} cannot be read: {error}") from error


def _parse(where: str, line: str, vocab_size: int | None) -> Document:
    try:
        row = json.loads(line)
        prompt, answer, temperature = row["prompt_ids"], row.get("response_ids"), float(row.get("temperature", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: no row with prompt_ids, response_ids and maybe a temperature ({error!r})") from error
    require(
        (bool(answer), f"{where}: the row has no answer (response_ids)"),
        (bool(prompt), f"{where}: the row has no prompt (prompt_ids)"),
        (
            _are_ids(prompt) and _are_ids(answer),
            f"{where}: prompt_ids and response_ids must be lists of token ids",
        ),
    )
    ids = [*prompt, *answer]
    check_ids(where, min(ids), max(ids), vocab_size)
    return Document(str(row.get("id", where)), np.asarray(ids, np.int32), len(prompt), temperature)


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, list) and set(map(type, ids)) == {int}  # isinstance would let True pass


def check_ids(where: str, lowest: int, highest: int, vocab_size: int | None) -> None:
    """Raises UserError if the lowest or the highest token id of a document is not one of the target's."""
    size = 2**31 if vocab_size is None else vocab_size
    if lowest < 0 or highest >= size:
        raise UserError(f"{where}: token id {lowest if lowest < 0 else highest} is not among the target's {size}")


def read_meta(folder: str | os.PathLike) -> dict[str, Any]:
    """What stands beside the answers about their making, by `distill` or TFDS; empty if there is no such file.

    Raises:
      UserError: the file cannot be read.
    """
    file = Path(folder) / (TFDS_META if (Path(folder) / "dataset_info.json").exists() else META)
    if not file.is_file():
        return {}
    try:
        return files.read_sealed(file)
    except UserError as error:
        raise UserError(f"{file}, which says how the answers were made, cannot be read: {error}") from error


def check_tokenizer(path: str | os.PathLike, fingerprint: str) -> None:
    """Raises UserError if the data says that it was made with another tokenizer than the target's."""
    stored = read_meta(path).get("tokenizer")
    if stored not in (None, fingerprint):
        raise UserError(f"the data in {path} was made with tokenizer {stored}, the target's is {fingerprint}")


def draft_vocabulary(documents: Sequence[Document], size: int, target: TargetConfig) -> np.ndarray:
    """The token ids of a pruned draft vocabulary: the `size` most frequent in answers, end tokens always, ascending."""
    counts = np.zeros(target.vocab_size, np.int64)
    for document in documents:
        np.add.at(counts, document.tokens[document.prompt :], 1)
    counts[list(target.eos_ids)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)
