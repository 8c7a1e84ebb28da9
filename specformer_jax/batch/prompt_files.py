"""Prompt files in, answer files out: JSON lines, checked on reading, never lost on writing."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specformer_jax import files
from specformer_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One row of a prompt file.

    Attributes:
      id: of the row ("id", "question_id", or its line number).
      turns: the user's messages; each is asked after the answer to the one before.
    """

    id: str
    turns: tuple[str, ...]


def read_prompts(path: str | os.PathLike) -> list[Conversation]:
    """Reads JSON lines with `prompt`, or `turns` as Spec-Bench and MT-Bench have them.

    Raises:
      UserError: an unreadable or empty file, or a malformed row (naming its line).
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() also splits at U+2028, legal in JSON
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompt file {path} cannot be read: {error}") from error
    found, seen = [], set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        conversation = _parse(path, number, line)
        if conversation.id in seen:
            raise UserError(f"{path}, line {number}: the id {conversation.id!r} stands there for the second time")
        seen.add(conversation.id)
        found.append(conversation)
    if not found:
        raise UserError(f"the prompt file {path} holds no prompts")
    return found


def _parse(path: Path, number: int, line: str) -> Conversation:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f'{where}: a row must be an object with "prompt" or "turns"')
    turns = row.get("turns", row.get("prompt"))
    turns = [turns] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t for t in turns):
        raise UserError(f'{where}: give "prompt", a text that is not empty, or "turns", a list of such texts')
    found = Conversation(str(row.get("id", row.get("question_id", number))), tuple(turns))
    check_unicode(where, found.id, *turns)
    return found


def check_unicode(where: str, *texts: str) -> None:
    """Refuses half of a surrogate pair, as JSON can write it and Python reads bytes that are no UTF-8.

    Raises:
      UserError: naming `where`.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the text is no Unicode ({error})") from error


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
        content = self.path.read_bytes()
        kept = []
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(keepends=True), 1):
            try:
                row = json.loads(line)
                if not isinstance(row["text"], str):
                    raise TypeError("an answer's text must be a string")
                if not row.get("error"):
                    self.done[row["id"], row.get("turn", 0)] = row
                    kept.append(line)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path}, line {number}: no answer row, so it cannot be resumed") from error
        if len(whole := b"".join(kept)) < len(content):
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


def rounds(conversations: list[Conversation]) -> Iterator[tuple[int, list[Conversation]]]:
    """(turn, the conversations that have it): a turn can only be asked once the one before is answered."""
    for turn in range(max(len(c.turns) for c in conversations)):
        yield turn, [c for c in conversations if len(c.turns) > turn]
