"""Rows of fields, whatever they stand in: JSON lines, a JSON array, Parquet, a dataset on disk or on the Hub."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from specformer_jax.errors import UserError

ID_KEYS = ("id", "prompt_id", "question_id")
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
DATASET_MARKS = ("dataset_dict.json", "state.json")  # what `datasets` leaves in a folder that it saved

Row = tuple[int, str, dict[str, Any]]  # its number in its source, where it stands, its fields


class PromptRow(NamedTuple):
    """One row of a prompt file or of another list of prompts, before its prompt is looked at.

    Attributes:
      where: where the row stands, to begin an error's sentence with.
      id: the name that answers to it go by; unique among the rows.
      fields: the whole row.
    """

    where: str
    id: str
    fields: dict[str, Any]


def read_rows(source: str | os.PathLike) -> Iterator[PromptRow]:
    """Reads the rows of a source, each with the id under "id", "prompt_id" or "question_id", else its line's number.

    Args:
      source: a file of JSON lines or of one JSON array (.gz too), a Parquet file, a folder of such files, a dataset
        that the package `datasets` saved, or a Hub id. A dataset may be followed by :SPLIT or :CONFIGURATION:SPLIT.

    Raises:
      UserError: nothing of these, an unreadable or malformed row (naming it), an id that is there twice or is no
        Unicode, or a package that is not installed.
    """
    seen: set[str] = set()
    for number, where, fields in _numbered(os.fspath(source)):
        name = str(next((fields[key] for key in ID_KEYS if fields.get(key) is not None), number))
        check_unicode(where, name)
        if name in seen:
            raise UserError(f"{where}: the id {name!r} stands there for the second time")
        seen.add(name)
        yield PromptRow(where, name, fields)


def _numbered(source: str) -> Iterator[Row]:
    path = Path(source)
    if not path.is_dir() and (path.exists() or path.name.endswith(ENDINGS)):
        yield from _read_file(path)
    elif path.is_dir() and not _is_dataset(path):
        rows = itertools.chain.from_iterable(map(_read_file, _files_of_rows(path)))
        yield from ((number, where, fields) for number, (_, where, fields) in enumerate(rows, 1))
    else:
        yield from _read_dataset(source)


def check_unicode(where: str, *texts: str) -> None:
    """Refuses half of a surrogate pair, as JSON can write it and Python reads bytes that are no UTF-8.

    Raises:
      UserError: naming `where`.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the text is no Unicode ({error})") from error


def _files_of_rows(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.iterdir() if file.name.endswith(ENDINGS))
    if not found:
        raise UserError(f"{folder} holds no file of rows: {', '.join(ENDINGS)} are read")
    return found


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        for number, fields in enumerate(_read_parquet(path), 1):
            yield number, f"{path}, row {number}", fields
        return
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"the file {path} cannot be read: {error}") from error
    if text.lstrip().startswith("["):
        values = ((number, f"{path}, row {number}", value) for number, value in enumerate(_parse(f"{path}", text), 1))
    else:  # splitlines() would also split at U+2028, which a JSON string may hold
        lines = ((number, f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1))
        values = ((number, where, _parse(where, line)) for number, where, line in lines if line.strip())
    for number, where, fields in values:
        if not isinstance(fields, dict):
            raise UserError(f"{where}: a row must be a JSON object of named fields")
        yield number, where, fields


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"to read {path}, pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"the file {path} cannot be read: {error}") from error


def _is_dataset(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in DATASET_MARKS)


def _read_dataset(source: str) -> Iterator[Row]:
    """A dataset of the package `datasets`, by folder or by Hub id, with its split and maybe its configuration."""
    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    try:
        import datasets
    except ImportError as error:
        what = "the dataset" if Path(name).is_dir() else "no file; to read it from the Hub"
        raise UserError(f"{source} is {what}, pip install datasets") from error
    try:
        if Path(name).is_dir():
            found = datasets.load_from_disk(name)
            rows = found[split] if isinstance(found, dict) else found
        else:
            rows = datasets.load_dataset(name, *rest[:-1], split=split)
        for number, fields in enumerate(rows, 1):
            yield number, f"{source}, row {number}", fields
    except Exception as error:  # the package raises many kinds
        raise UserError(f"the dataset {source} cannot be read: {error}") from error
