"""Self-distilled answers -> packed global batches, the same for any number of hosts.

Which documents share a packed row, and which rows a batch, follows from the documents' lengths, the seed and the epoch
alone. Batch i is a function of i: each host reads its rows of it, and the iterator's state is one number.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from specformer_jax.config import TargetConfig
from specformer_jax.errors import UserError

META = "distilled.json"  # beside the shards of `distill`: which target and tokenizer they belong to
TFDS_META = "metadata.json"  # the same beside dataset_info.json, where TFDS looks for it
OPEN_ROWS = 16  # rows that first-fit packing may still add to


class Document(NamedTuple):
    """One prompt and the target's answer.

    Attributes:
      id: of the prompt.
      tokens: i32[n], prompt and answer.
      prompt: how many of them are the prompt.
      temperature: the answer was sampled with.
    """

    id: str
    tokens: np.ndarray
    prompt: int
    temperature: float


def read_documents(path: str | os.PathLike, vocab_size: int | None = None) -> Sequence[Document]:
    """Reads distilled answers: a JSONL file (.gz too), a directory of such shards, or a TFDS directory.

    A row holds `prompt_ids` and `response_ids`, and may hold `id` and `temperature`.

    Args:
      vocab_size: ids must be below it; those of a TFDS directory are checked when a document is read.

    Raises:
      UserError: an unreadable or empty file, a row without an answer, ids that the target does not have.
    """
    path = Path(path)
    if (path / "dataset_info.json").exists():
        from specformer_jax.training.data import tfds_files

        return tfds_files.open_source(path, vocab_size)
    files = sorted(path.glob("*.jsonl*")) if path.is_dir() else [path]
    files = [file for file in files if file.name.endswith((".jsonl", ".jsonl.gz")) or not path.is_dir()]
    documents = [document for file in files for document in _read_file(file, vocab_size)]
    if not documents:
        raise UserError(f"the data in {path} is empty: `train.py distill` makes answers to train on")
    return documents


def _read_file(file: Path, vocab_size: int | None) -> Iterator[Document]:
    opener = gzip.open if file.name.endswith(".gz") else open
    try:
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
    if not answer:
        raise UserError(f"{where}: the row has no answer (response_ids)")
    if not prompt:
        raise UserError(f"{where}: the row has no prompt (prompt_ids)")
    if not all(isinstance(ids, list) and set(map(type, ids)) == {int} for ids in (prompt, answer)):
        raise UserError(f"{where}: prompt_ids and response_ids must be lists of token ids")
    ids = [*prompt, *answer]
    check_ids(where, min(ids), max(ids), vocab_size)
    return Document(str(row.get("id", where)), np.asarray(ids, np.int32), len(prompt), temperature)


def check_ids(where: str, lowest: int, highest: int, vocab_size: int | None) -> None:
    """Raises UserError if the lowest or the highest token id of a document is not one of the target's."""
    size = 2**31 if vocab_size is None else vocab_size
    if lowest < 0 or highest >= size:
        raise UserError(f"{where}: token id {lowest if lowest < 0 else highest} is not among the target's {size}")


def read_meta(folder: str | os.PathLike) -> dict[str, Any]:
    """What `distill` or `tfds_files.build` wrote beside the answers about them; empty if there is no such file.

    Raises:
      UserError: the file cannot be read.
    """
    file = Path(folder) / (TFDS_META if (Path(folder) / "dataset_info.json").exists() else META)
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}, which says how the answers were made, cannot be read: {error}") from error


def check_tokenizer(path: str | os.PathLike, fingerprint: str) -> None:
    """Raises UserError if the data says that it was made with another tokenizer than the target's."""
    stored = read_meta(path).get("tokenizer")
    if stored not in (None, fingerprint):
        raise UserError(f"the data in {path} was made with tokenizer {stored}, the target's is {fingerprint}")


def draft_vocabulary(documents: Sequence[Document], size: int, target: TargetConfig) -> np.ndarray:
    """The `size` most frequent answer tokens and the end tokens, ascending: i32[V']."""
    counts = np.zeros(target.vocab_size, np.int64)
    for document in documents:
        np.add.at(counts, document.tokens[document.prompt :], 1)
    counts[list(target.eos_ids)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


class Batches:
    """Packed batches by number; a random-access source for grain.

    Batch i holds, for this host's share of the rows (R rows of T tokens, A anchors each, J slots):

      tokens i32[R, T], segments i32[R, T] (0 is padding), anchors i32[R, A], labels i32[R, A, J] (token ids, -1 where
      masked), and hooks u16[R, T, G, D] (bfloat16 bits) where a store of hooks is given.

    An anchor t is a position whose next token t + 1 belongs to the answer; slot j is labelled with token t + 2 + j of
    the same document.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        slots: int,
        sequence_length: int,
        rows: int,
        anchors: int | None = None,
        seed: int = 0,
        share: Sequence[int] | None = None,
        hooks: Callable[[int], np.ndarray] | None = None,
    ):
        """
        Args:
          documents: random access; those with fewer than 3 answer tokens are left out.
          slots: J.
          sequence_length: T; longer documents are cut.
          rows: of the global batch.
          anchors: A of a row; None: T.
          share: which of these rows this host's batches hold (`train_step.host_rows`); None: all.
          hooks: document number -> u16[n, G, D].
        """
        self._documents, self._hooks = documents, hooks
        self._slots, self._length, self._rows = slots, sequence_length, rows
        self._anchors, self._seed = anchors or sequence_length, seed
        self._share = range(rows) if share is None else share
        sizes = [(min(len(d.tokens), sequence_length), d.prompt) for d in documents]
        self._sizes = [(size, min(max(size - prompt - 1, 0), self._anchors)) for size, prompt in sizes]
        self._usable = np.array([i for i, (size, n) in enumerate(self._sizes) if n >= 1], np.int64)
        if not len(self._usable):
            raise UserError("no document of the data has an answer of three tokens within the sequence length")
        self._starts = [0]  # first batch of each epoch planned so far

    def __len__(self) -> int:
        return 2**31 - 1  # epochs follow each other without an end

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch = 0
        while True:  # epochs differ in their number of batches, so the earlier ones are planned too
            if epoch + 1 == len(self._starts):
                self._starts.append(self._starts[-1] + len(self._plan(epoch)) // self._rows)
            if index < self._starts[epoch + 1]:
                break
            epoch += 1
        first = (index - self._starts[epoch]) * self._rows
        plan = self._plan(epoch)
        rows = [self._row(plan[first + r]) for r in self._share]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one source a run
    def _plan(self, epoch: int) -> list[list[int]]:
        """Which documents each packed row of an epoch holds: first fit among the rows still open, in shuffled order."""
        order = np.random.default_rng((self._seed, epoch)).permutation(self._usable)
        closed: list[list[int]] = []
        opened: list[tuple[list[int], int, int]] = []
        for i in order.tolist():
            size, anchors = self._sizes[i]
            for place, (row, tokens, used) in enumerate(opened):
                if tokens + size <= self._length and used + anchors <= self._anchors:
                    opened[place] = ([*row, i], tokens + size, used + anchors)
                    break
            else:
                opened.append(([i], size, anchors))
                if len(opened) > OPEN_ROWS:
                    closed.append(opened.pop(0)[0])
        closed += [row for row, *_ in opened]
        packed = len(closed)
        while len(closed) % self._rows:  # the last batch is filled up with rows of the same epoch, few ones repeatedly
            closed.append(closed[len(closed) % self._rows % packed])
        return closed

    def _row(self, members: list[int]) -> dict[str, np.ndarray]:
        T, A, J = self._length, self._anchors, self._slots
        row: dict[str, Any] = {
            "tokens": np.zeros(T, np.int32),
            "segments": np.zeros(T, np.int32),
            "anchors": np.zeros(A, np.int32),
            "labels": np.full((A, J), -1, np.int32),
        }
        at = used = 0
        for segment, i in enumerate(members, 1):
            document, (size, count) = self._documents[i], self._sizes[i]
            row["tokens"][at : at + size] = document.tokens[:size]
            row["segments"][at : at + size] = segment
            anchors = np.arange(document.prompt - 1, document.prompt - 1 + count)
            ahead = anchors[:, None] + 2 + np.arange(J)
            labels = np.where(ahead < size, document.tokens[np.minimum(ahead, size - 1)], -1)
            row["anchors"][used : used + count] = at + anchors
            row["labels"][used : used + count] = labels
            if self._hooks is not None:
                stored = self._hooks(i)
                hooks = row.setdefault("hooks", np.zeros((T, *stored.shape[1:]), np.uint16))
                hooks[at : at + size] = stored[:size]
            at, used = at + size, used + count
        return row


def iterate_batches(source: Batches, prefetch: int = 2) -> grain.DatasetIterator:
    """Batches in order, read ahead by threads; `get_state` and `set_state` of the iterator resume it exactly."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))
