"""Prompt files in, answer files out: dialogues checked on reading, answers never lost on writing."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    asked = _said(row.get("system"), row["prompt"]) if "prompt" in row else None
    return Answered((row["id"], row.get("turn", 0)), asked, bool(row.get("error")))


def asked_turns(conversations: Sequence[Conversation]) -> dict[tuple, str]:
    """What conversations ask, under the keys of `read_answer`."""
    return {(c.id, turn): _said(c.system, text) for c in conversations for turn, text in enumerate(c.turns)}


@contextlib.contextmanager
def kept_if_written(output: AnswerFile | None) -> Iterator[None]:
    """Where a mistake ends what is done within it before the first answer, no empty file is left behind."""
    try:
        yield
    except UserError:
        if output is not None:
            output.discard_if_empty()
        raise


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

    def discard_if_empty(self) -> None:
        """Takes the file away again where it has no row, with what stands beside it."""
        if self.path.is_file() and not self.path.stat().st_size:
            for file in (self.path, self.path.with_name(f"{self.path.name}.about.json")):
                file.unlink(missing_ok=True)

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
                    f"{self.path} answers {answers} in row {', turn '.join(map(repr, key))}, where the prompts"
                    f" {'have nothing' if asks is None else f'ask {asks}'}: name another file, or give the prompts"
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


def _said(system: str | None, text: str) -> str:
    return repr(text) if system is None else f"{text!r} (with the system prompt {system!r})"


def rounds(conversations: Sequence[Conversation]) -> Iterator[tuple[int, list[Conversation]]]:
    """(turn, the conversations that have it): a turn can only be asked once the one before is answered."""
    for turn in range(max(len(c.turns) for c in conversations)):
        yield turn, [c for c in conversations if len(c.turns) > turn]
