"""Prompt files in, answer files out: JSON lines, checked on reading, never lost on writing."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from specformer_jax import files
from specformer_jax.errors import UserError


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


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What one row of a prompt file asks.

    Attributes:
      id: the row's "id" or "question_id", or else its line number.
      turns: the user's messages; each is asked after the answer to the one before.
    """

    id: str
    turns: tuple[str, ...]


def read_prompts(path: str | os.PathLike) -> list[Conversation]:
    """Reads JSON lines with `prompt`, or `turns` as Spec-Bench and MT-Bench have them.

    Raises:
      UserError: an unreadable or empty file, or a malformed row (naming its line).
    """
    rows = ((f"{path}, line {number}", number, fields) for number, fields in read_objects(path))
    found = [Conversation(row.id, _turns(row)) for row in identified(rows, ("id", "question_id"))]
    if not found:
        raise UserError(f"the prompt file {path} holds no prompts")
    return found


def read_objects(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file, one a line, each with its line number from 1; empty lines are passed over.

    Raises:
      UserError: an unreadable file, or a line that is no JSON object (naming it).
    """
    try:
        # splitlines() would also split at U+2028, which a JSON string may hold.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompt file {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f'{path}, line {number}: a row must be an object with "prompt" or "turns"')
        yield number, row


def identified(rows: Iterable[tuple[str, int, dict[str, Any]]], keys: Sequence[str]) -> Iterator[PromptRow]:
    """Gives each row its id: what stands under the first of some keys that it has, or else its number.

    Args:
      rows: where each row stands, its number and its fields.
      keys: the keys an id may stand under.

    Raises:
      UserError: an id that is there twice or is no Unicode.
    """
    seen: set[str] = set()
    for where, number, fields in rows:
        name = str(next((fields[key] for key in keys if key in fields), number))
        check_unicode(where, name)
        if name in seen:
            raise UserError(f"{where}: the id {name!r} stands there for the second time")
        seen.add(name)
        yield PromptRow(where, name, fields)


def _turns(row: PromptRow) -> tuple[str, ...]:
    turns = row.fields.get("turns", row.fields.get("prompt"))
    turns = [turns] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise UserError(f'{row.where}: give "prompt", a text that is not empty, or "turns", a list of such texts')
    check_unicode(row.where, *turns)
    return tuple(turns)


def check_unicode(where: str, *texts: str) -> None:
    """Refuses half of a surrogate pair, as JSON can write it and Python reads bytes that are no UTF-8.

    Raises:
      UserError: naming `where`.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the text is no Unicode ({error})") from error


class Answered(NamedTuple):
    """Which answer a row of an answer file is.

    Attributes:
      key: what names it: the id of its row, and its turn where rows have several.
      asked: what it answers; None where the row does not say it, as an earlier version wrote it.
      failed: whether it is an error, to be asked again.
    """

    key: tuple[str] | tuple[str, int]
    asked: str | None
    failed: bool


def read_answer(row: dict[str, Any]) -> Answered:
    """Which turn of which conversation a row answers.

    Raises:
      KeyError, TypeError: it is no answer's row.
    """
    if not isinstance(row["text"], str):
        raise TypeError("an answer's text must be a string")
    return Answered((row["id"], row.get("turn", 0)), row.get("prompt"), bool(row.get("error")))


def asked_turns(conversations: Sequence[Conversation]) -> dict[tuple, str]:
    """What conversations ask, under the keys of `read_answer`."""
    return {(c.id, turn): text for c in conversations for turn, text in enumerate(c.turns)}


class AnswerFile:
    """An answer file that grows by one whole line an answer: a killed run loses no finished row.

    Each row has its own digest, and beside the file stands what its answers were made with.

    Attributes:
      path: where it is.
      done: the rows of what need not be asked again, by their keys.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        asked: Mapping[tuple, str],
        made_with: dict[str, Any],
        *,
        resume: bool,
        read: Callable[[dict[str, Any]], Answered] = read_answer,
    ):
        """Finds out what is done, and that the file can be written.

        Args:
          path: the file.
          asked: what is asked, by the keys of the answers to it.
          made_with: what the answers depend on beside that, as JSON has it: the target and the sampling.
          resume: whether to continue a file that is there.
          read: says which answer a row is. KeyError, TypeError, ValueError or AttributeError say that it is none.

        Raises:
          UserError: it is there already and `resume` is off; it holds answers to other prompts, or made in another way,
            or is damaged; or it cannot be written or read.
        """
        self.path, self._read = Path(path), read
        made_with = json.loads(json.dumps(made_with))  # as it is read back
        self.done: dict[tuple, dict[str, Any]] = {}
        about = self.path.with_name(f"{self.path.name}.about.json")
        try:
            kept, is_there = b"", self.path.exists() and self.path.stat().st_size > 0
            if is_there:
                if not resume:
                    raise UserError(f"{self.path} is there already: continue it with --resume or name another file")
                kept = self._recover()
                self._check(about, asked, made_with)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not is_there or not about.exists():
                files.write_whole(about, json.dumps(files.seal(made_with)) + "\n")
            if is_there and len(kept) < self.path.stat().st_size:
                files.write_whole(self.path, kept)
            self.path.touch()
        except OSError as error:
            raise UserError(f"the output file {self.path} cannot be written: {error}") from error

    def _recover(self) -> bytes:
        """Reads the finished rows; without those that failed and a last line that a killed run left unfinished."""
        kept = []
        for number, line in enumerate(files.whole_lines(self.path), 1):
            where = f"{self.path}, line {number}"
            try:
                if self._note(files.unseal(where, json.loads(line))):
                    kept.append(line)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{where}: no answer row, so it cannot be resumed") from error
        return b"".join(kept)

    def _check(self, about: Path, asked: Mapping[tuple, str], made_with: dict[str, Any]) -> None:
        """Refuses to go on with answers to other prompts, or made in another way."""
        stored = files.read_sealed(about) if about.exists() else {}  # an earlier version did not keep it
        other = [f"{name} {stored[name]}, not {new}" for name, new in made_with.items() if stored.get(name, new) != new]
        if other:
            raise UserError(f"{self.path} holds answers made with {' and '.join(other)}: name another file")
        for key, row in self.done.items():
            answers, asks = self._read(row).asked, asked.get(key)
            if answers is not None and answers != asks:
                raise UserError(
                    f"{self.path} answers {answers!r} in row {', turn '.join(map(repr, key))}, where the prompts"
                    f" {'have nothing' if asks is None else f'ask {asks!r}'}: name another file, or give the prompts"
                    " of before (rows that have ids may move)"
                )

    def _note(self, row: dict[str, Any]) -> bool:
        """Notes an answer; False where it is an error."""
        answered = self._read(row)
        if not answered.failed:
            self.done[answered.key] = row
        return not answered.failed

    def write(self, row: dict[str, Any]) -> None:
        """Appends one answer.

        Raises:
          UserError: the disk refuses it; what was written before stays.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(files.seal(row), ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"the output file {self.path} cannot be written: {error}; --resume continues it") from error
        self._note(row)


def rounds(conversations: list[Conversation]) -> Iterator[tuple[int, list[Conversation]]]:
    """(turn, the conversations that have it): a turn can only be asked once the one before is answered."""
    for turn in range(max(len(c.turns) for c in conversations)):
        yield turn, [c for c in conversations if len(c.turns) > turn]
