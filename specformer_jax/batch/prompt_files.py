"""Prompt files in, answer files out: dialogues checked on reading, answers never lost on writing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from specformer_jax import files
from specformer_jax.batch.conversations import Conversation, read_conversations
from specformer_jax.errors import UserError


def read_prompts(source: str | os.PathLike, system: str | None = None) -> list[Conversation]:
    """Reads dialogues of which every one is to be answered whole.

    Args:
      source: what `conversations.read_conversations` reads.
      system: the system prompt of the dialogues that have none of their own.

    Raises:
      UserError: what `read_conversations` raises, or a row of which something cannot be used (naming it).
    """
    found, omissions = read_conversations(source, system)
    if omissions:
        raise UserError(f"{omissions[0].where}: {omissions[0].reason}, which cannot be answered")
    return found


class AnswerFile:
    """An answer file that grows by one whole line an answer: a killed run loses no finished row.

    Rows are keyed by id and turn, so that a resumed run knows what is done; rows with an `error` are asked again.
    """

    def __init__(self, path: str | os.PathLike, *, resume: bool):
        """Finds out what is done, and that the file can be written.

        Raises:
          UserError: it is there already and `resume` is off, or it cannot be written or read.
        """
        self.path = Path(path)
        self.done: dict[tuple[str, int], dict[str, Any]] = {}
        try:
            if self.path.exists() and self.path.stat().st_size:
                if not resume:
                    raise UserError(f"{self.path} is there already: continue it with --resume or name another file")
                self._recover()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise UserError(f"the output file {self.path} cannot be written: {error}") from error

    def _recover(self) -> None:
        """Reads the finished rows; takes out those that failed and a last line that a killed run left unfinished."""
        kept = []
        for number, line in enumerate(files.whole_lines(self.path), 1):
            try:
                row = json.loads(line)
                if not isinstance(row["text"], str):
                    raise TypeError("an answer's text must be a string")
                if not row.get("error"):
                    self.done[row["id"], row.get("turn", 0)] = row
                    kept.append(line)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path}, line {number}: no answer row, so it cannot be resumed") from error
        whole = b"".join(kept)
        if len(whole) < self.path.stat().st_size:
            files.write_whole(self.path, whole.decode())

    def write(self, row: dict[str, Any]) -> None:
        """Appends one answer.

        Raises:
          UserError: the disk refuses it; what was written before stays.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"the output file {self.path} cannot be written: {error}; --resume continues it") from error
        self.done[row["id"], row.get("turn", 0)] = row


def rounds(conversations: Sequence[Conversation]) -> Iterator[tuple[int, list[Conversation]]]:
    """(turn, the conversations that have it): a turn can only be asked once the one before is answered."""
    for turn in range(max(len(c.turns) for c in conversations)):
        yield turn, [c for c in conversations if len(c.turns) > turn]
