"""Self-distilled answers as documents: read from JSONL shards and checked, with what is known about their making."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specformer_jax import files
from specformer_jax.config import TargetConfig
from specformer_jax.errors import UserError, require

META = "distilled.json"  # beside the shards of `distill`: which target and tokenizer they belong to
TFDS_META = "metadata.json"  # the same beside dataset_info.json, where TFDS looks for it
LEFT_OUT = "left_out"  # how the names of lists of what was left out begin, which stand beside the shards


class Document(NamedTuple):
    """A dialogue with the target's answers in it.

    Attributes:
      id: the id that the dialogue had in its prompt file.
      tokens: the token ids of all that was said, int32.
      answers: where each answer stands in them, as the number of its first token and of the one behind its last.
      temperature: the temperature that the answers were sampled at; 0 is greedy.
    """

    id: str
    tokens: np.ndarray
    answers: tuple[tuple[int, int], ...]
    temperature: float

    @classmethod
    def of(cls, id: str, prompt: Sequence[int], answer: Sequence[int], temperature: float = 0.0) -> Document:
        """One prompt and the answer to it."""
        tokens = np.asarray([*prompt, *answer], np.int32)
        return cls(id, tokens, ((len(prompt), len(tokens)),), temperature)


class AnswerRow(NamedTuple):
    """A row of a shard: the answer to one turn of a dialogue, and all that was said before it."""

    id: str
    turn: int
    prompt: list[int]
    answer: list[int]
    temperature: float


def holds_answers(path: str | os.PathLike) -> bool:
    """Whether a file or folder holds answers, not dialogues: its first row says so, or what stands beside it."""
    path = Path(path)
    if (path / META).exists() or (path / TFDS_META).exists():
        return True
    return any(map(_begins_with_an_answer, _shards(path)[:1]))


def _begins_with_an_answer(file: Path) -> bool:
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            row = json.loads(next((line for line in lines if line.strip()), ""))
    except (OSError, EOFError, ValueError, zlib.error):
        return False
    return isinstance(row, dict) and "response_ids" in row


def read_shards(path: str | os.PathLike, vocab_size: int | None = None) -> list[Document]:
    """Reads a JSONL file (.gz too), or a directory of them, shards that `distill` has not finished (.part) included.

    A row holds `prompt_ids` and `response_ids`, and may hold `id`, `turn` and `temperature`. Turns of one dialogue
    become one document where each begins with the tokens of the one before.

    Args:
      path: the file or the directory.
      vocab_size: token ids must be below it.

    Raises:
      UserError: an unreadable, damaged or empty file, a row without an answer, ids that the target does not have.
    """
    documents = _joined(_rows_of(_shards(Path(path)), vocab_size))
    if not documents:
        raise UserError(f"the data in {path} is empty: `train.py distill` makes answers to train on")
    return documents


def _shards(path: Path) -> list[Path]:
    """The file, or those of a directory that hold answers."""
    if not path.is_dir():
        return [path]
    listed = [file for ending in ("*.jsonl", "*.jsonl.gz") for file in path.glob(ending)]
    # "shard.jsonl.1234.part" is what a process that was killed left of a file that it wrote whole.
    listed += [file for file in path.glob("*.part") if "." not in file.stem]
    return sorted(file for file in listed if not file.name.startswith(LEFT_OUT))


def _rows_of(found: Sequence[Path], vocab_size: int | None) -> Iterator[AnswerRow]:
    """The rows of all files; a .part file, which sorts behind its shard, may repeat what the shard has already."""
    seen: set[tuple[str, int]] = set()
    for file in found:
        for row in _read_file(file, vocab_size):
            if file.suffix != ".part" or (row.id, row.turn) not in seen:
                yield row
            seen.add((row.id, row.turn))


def _joined(rows: Iterable[AnswerRow]) -> list[Document]:
    """Documents of rows; a turn goes on with the document of the turn before it, where the tokens agree."""
    documents: list[Document] = []
    newest: dict[str, tuple[int, int]] = {}  # of a dialogue's id: its last turn, and the number of its document
    for row in rows:
        turn, number = newest.get(row.id, (None, -1))
        before = documents[number] if turn is not None and row.turn == turn + 1 else None
        document = Document.of(row.id, row.prompt, row.answer, row.temperature)
        if before is not None and np.array_equal(document.tokens[: len(before.tokens)], before.tokens):
            documents[number] = document._replace(answers=before.answers + document.answers)
        else:
            number = len(documents)
            documents.append(document)
        newest[row.id] = (row.turn, number)
    return documents


def _read_file(file: Path, vocab_size: int | None) -> Iterator[AnswerRow]:
    try:
        files.check_digest(file)
        if file.suffix == ".part":
            # A killed run, or one that is still at work, may have left half a line at the end.
            text = b"".join(files.whole_lines(file)).decode("utf-8")
        elif file.suffix == ".gz":
            text = gzip.decompress(file.read_bytes()).decode("utf-8")
        else:
            text = file.read_text(encoding="utf-8")
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _parse(f"{file}, line {number}", line, vocab_size)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"the data file {file} cannot be read: {error}") from error


def _parse(where: str, line: str, vocab_size: int | None) -> AnswerRow:
    try:
        row: Any = files.unseal(where, json.loads(line))
        prompt, answer = row["prompt_ids"], row.get("response_ids")
        temperature, turn = float(row.get("temperature", 0.0)), int(row.get("turn", 0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: no row with prompt_ids, response_ids and maybe a temperature ({error!r}); `train.py distill"
            " --answers keep` makes such rows of answers that are there as text"
        ) from error
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
    return AnswerRow(str(row.get("id", where)), turn, prompt, answer, temperature)


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


def draft_vocabulary(documents: Sequence[Document], size: int, target: TargetConfig) -> np.ndarray:
    """The token ids of a pruned draft vocabulary: the `size` most frequent in answers, end tokens always, ascending."""
    counts = np.zeros(target.vocab_size, np.int64)
    for document in documents:
        for begin, end in document.answers:
            np.add.at(counts, document.tokens[begin:end], 1)
    counts[list(target.eos_ids)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)
