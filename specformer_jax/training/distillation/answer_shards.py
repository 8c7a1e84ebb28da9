"""The shards of `distill`: files of answers that lose no row, however a run ends, and are what was written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from specformer_jax import files
from specformer_jax.errors import UserError
from specformer_jax.training.data.documents import META, read_meta

Key = tuple[str, int]  # of an answer: the id of its dialogue, and the number of its turn


class Shard:
    """A shard in the making: rows go to its .part file as they come, and to the shard once all are there."""

    def __init__(self, file: Path, dialogues: Sequence[str]):
        """
        Args:
          file: where the shard goes; one that a run over fewer prompts finished is made longer.
          dialogues: the ids of the dialogues that belong to it, in order.

        Raises:
          UserError: it holds a line that is no answer, or a file is damaged.
        """
        self.name = file.stem
        self._file, self._part = file, file.with_suffix(".part")
        self._order = {name: number for number, name in enumerate(dialogues)}
        self._open = set(dialogues)
        if file.exists():
            files.check_digest(file)
        stored = _rows(file, file.read_bytes().splitlines() if file.exists() else [])
        self._stored = list(stored)
        self._rows = stored | _rows(self._part, files.whole_lines(self._part))
        self._unclaimed = set(self._rows)
        files.cut_torn_line(self._part)

    def find(self, dialogue: str, turn: int, prompt_ids: Sequence[int]) -> dict[str, Any] | None:
        """The answer to a turn whose prompt has these token ids, None if it is not there yet.

        Raises:
          UserError: there is an answer to another prompt.
        """
        row = self._rows.get((dialogue, turn))
        if row is not None and row.get("prompt_ids") != list(prompt_ids):
            raise self._stranger(dialogue)
        self._unclaimed.discard((dialogue, turn))
        return row

    def check_all_found(self) -> None:
        """Raises UserError if there is an answer that `find` was not asked for."""
        if self._unclaimed:
            raise self._stranger(next(name for name, turn in self._rows if (name, turn) in self._unclaimed))

    def add(self, row: dict[str, Any]) -> None:
        """Keeps an answer for good."""
        with self._part.open("a", encoding="utf-8") as out:
            out.write(lines([files.seal(row)]))
            out.flush()
            os.fsync(out.fileno())
        self._rows[_key(row)] = row

    def end(self, dialogue: str) -> None:
        """A dialogue has all its answers; with the last one the shard is finished."""
        self._open.discard(dialogue)
        if not self._open:
            # Answers end in any order; the shard has that of the prompts.
            wanted = sorted(self._rows, key=lambda key: (self._order[key[0]], key[1]))
            if self._stored != wanted or not files.has_digest(self._file):
                files.write_with_digest(self._file, lines([self._rows[key] for key in wanted]))
            self._part.unlink(missing_ok=True)

    def _stranger(self, dialogue: str) -> UserError:
        return UserError(
            f"{self._file} answers a prompt {dialogue!r} that is none of this run's: choose another folder, or give the"
            " prompts, system prompts, turns and max_prompt_tokens of before"
        )


def check_folder(folder: Path, meta: dict[str, Any], shards: int) -> None:
    """Keeps in the folder what the answers of a run of so many shards depend on, or compares.

    Raises:
      UserError: the folder holds answers made in another way, or shards of more prompts.
    """
    for file in sorted(folder.glob("shard-*")):
        if file.stem[6:].isdecimal() and int(file.stem[6:]) >= shards:
            raise UserError(
                f"{file} answers prompts that are none of this run's: choose another folder, or give the prompts of"
                " before"
            )
    if not (folder / META).exists():
        files.write_whole(folder / META, lines([files.seal(meta)]))
        return
    stored = read_meta(folder)  # an earlier version kept fewer of them
    other = [f"{name} {stored[name]}, not {value}" for name, value in meta.items() if stored.get(name, value) != value]
    if other:
        raise UserError(f"{folder} holds answers made with {', and '.join(other)}: choose another folder")


def lines(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _key(row: dict[str, Any]) -> Key:
    return row["id"], row.get("turn", 0)


def _rows(file: Path, lines: Sequence[bytes]) -> dict[Key, dict[str, Any]]:
    """Parses the lines of a shard or of its .part file; the rows by their ids and turns.

    Raises:
      UserError: a line is no answer, or not the one that was written there.
    """
    try:
        objects = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
        rows = [files.unseal(f"{file}, line {number}", row) for number, row in objects]
        return {_key(row): row for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} holds a line that is no answer ({error!r}): mend it, or remove the file") from error
