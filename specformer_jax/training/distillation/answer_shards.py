"""The shards of `distill`: files of answers that lose no row, however a run ends, and are what was written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from specformer_jax import files
from specformer_jax.errors import UserError


class Shard:
    """A shard in the making: rows go to its .part file as they come, and to the shard once all are there."""

    def __init__(self, file: Path, wanted: dict[str, list[int]]):
        """
        Args:
          file: where the shard goes; one that a run over fewer prompts finished is made longer.
          wanted: the prompt's token ids of each row by the row's id, in order.

        Raises:
          UserError: there is an answer to another prompt, or a file is damaged.
        """
        self.name = file.stem
        self._file, self._part, self._wanted = file, file.with_suffix(".part"), list(wanted)
        if file.exists():
            files.check_digest(file)
        stored = _rows(file, file.read_bytes().splitlines() if file.exists() else [])
        self._stored = list(stored)
        self._rows = stored | _rows(self._part, files.whole_lines(self._part))
        files.cut_torn_line(self._part)
        for name, row in self._rows.items():
            if wanted.get(name) != row.get("prompt_ids"):
                raise UserError(
                    f"{file} answers a prompt {name!r} that is none of this run's: choose another folder, or give the"
                    " prompts and the max_prompt_tokens of before"
                )
        self._finish()

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row for good."""
        with self._part.open("a", encoding="utf-8") as out:
            out.write(lines([files.seal(row)]))
            out.flush()
            os.fsync(out.fileno())
        self._rows[row["id"]] = row
        self._finish()

    def _finish(self) -> None:
        if all(name in self._rows for name in self._wanted):
            # Answers end in any order; the shard has that of the prompts.
            if self._stored != self._wanted or not files.has_digest(self._file):
                files.write_with_digest(self._file, lines([self._rows[name] for name in self._wanted]))
            self._part.unlink(missing_ok=True)


def lines(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _rows(file: Path, lines: Sequence[bytes]) -> dict[str, dict[str, Any]]:
    """Parses the lines of a shard or of its .part file; the rows by their ids.

    Raises:
      UserError: a line is no answer, or not the one that was written there.
    """
    try:
        objects = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
        rows = [files.unseal(f"{file}, line {number}", row) for number, row in objects]
        return {row["id"]: row for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} holds a line that is no answer ({error!r}): mend it, or remove the file") from error
