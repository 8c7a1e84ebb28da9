"""What a job leaves out of its data, and why: every row, message and token that is not used is counted and listed."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Any

from specformer_jax import files
from specformer_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Omission:
    """A part of a row that is not used.

    Attributes:
      where: where the row stands, or the id it goes by.
      part: what is left out: "row", "turn", "message", "answer" or "token".
      count: how many of these.
      reason: why; the same words for the same kind, so that they can be counted.
    """

    where: str
    part: str
    count: int
    reason: str


def summary(omissions: Iterable[Omission]) -> list[str]:
    """A line for each kind of omission, the most frequent first within rows, turns, messages, answers and tokens.

    >>> summary([Omission("a", "row", 1, "empty"), Omission("b", "row", 1, "empty"), Omission("c", "token", 9, "long")])
    ['left out 2 rows: empty', 'left out 9 tokens of 1 row: long']
    """
    lines = []
    for entry in counts(omissions):
        named = _number(entry["count"], entry["part"])
        of = "" if entry["part"] == "row" else f" of {_number(entry['rows'], 'row')}"
        lines.append(f"left out {named}{of}: {entry['reason']}")
    return lines


def counts(omissions: Iterable[Omission]) -> list[dict[str, Any]]:
    """The omissions by part and reason: how many of them, and of how many rows, in the order of `summary`."""
    total: collections.Counter[tuple[str, str]] = collections.Counter()
    rows: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    for omission in omissions:
        kind = (omission.part, omission.reason)
        total[kind] += omission.count
        rows[kind].add(omission.where)
    parts = ("row", "turn", "message", "answer", "token")
    ordered = sorted(total, key=lambda kind: (parts.index(kind[0]), -total[kind], kind[1]))
    return [
        {"part": part, "reason": reason, "count": total[part, reason], "rows": len(rows[part, reason])}
        for part, reason in ordered
    ]


def write(path: str | os.PathLike, omissions: Iterable[Omission]) -> None:
    """Lists the omissions as JSON lines; where there are none, no file is written and an old one goes.

    Raises:
      UserError: the file cannot be written.
    """
    text = "".join(json.dumps(dataclasses.asdict(omission), ensure_ascii=False) + "\n" for omission in omissions)
    try:
        if text:
            files.write_whole(path, text)
        elif os.path.exists(path):
            os.unlink(path)
    except OSError as error:
        raise UserError(f"what was left out cannot be listed in {path}: {error}") from error


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
