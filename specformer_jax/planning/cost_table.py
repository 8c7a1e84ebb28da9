"""What a decode step costs by the tokens it reads and the positions in use, and how steps are timed side by side."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from specformer_jax import files
from specformer_jax.errors import UserError

S = TypeVar("S")

log = logging.getLogger(__name__)

ROUNDS, LEAST_ROUNDS = 9, 5  # a measurement has so many, each of which goes through all steps once
SECONDS = 3.0  # after which a measurement makes no more rounds than it must


@dataclasses.dataclass(frozen=True)
class CostTable:
    """How long a step takes.

    Attributes:
      seconds: the seconds of one step that drafts by T, the tokens it reads, beside an empty cache.
      per_position: the seconds that each position in use, of all rows together, adds to a step of any T.
      plain: the same of steps that draft nothing, where T may be the number of the rows.
      source: how the table was found, for people; a file is only read for the source it was written for.
    """

    seconds: Mapping[int, float]
    per_position: float
    source: str
    plain: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def of(self, size: int, positions: int, drafts: bool = True) -> float:
        """The seconds of a step that reads so many tokens while so many positions are in use.

        Args:
          drafts: whether it makes the next drafts, too.
        """
        seconds = self.seconds[size] if drafts else self.plain.get(size, self.seconds[size])
        return seconds + self.per_position * positions

    def check(self, sizes: Sequence[int]) -> None:
        """Raises UserError unless it has every one of these T."""
        missing = [size for size in sizes if size not in self.seconds]
        if missing:
            raise UserError(f"the cost table has no step of {missing[0]} tokens: make it for this engine's sizes")

    def text(self) -> str:
        """The table as JSON."""
        steps: list[dict[str, Any]] = [
            {"tokens": size, "seconds": s} | ({"plain": self.plain[size]} if size in self.plain else {})
            for size, s in sorted(self.seconds.items())
        ]
        return json.dumps({"source": self.source, "per_position": self.per_position, "steps": steps}, indent=1) + "\n"

    @classmethod
    def parse(cls, text: str) -> CostTable:
        """Reads what `text` wrote.

        Raises:
          ValueError, KeyError, TypeError: it is something else.
        """
        stored = json.loads(text)
        if all("k" in row for row in stored["steps"]) or not any("plain" in row for row in stored["steps"]):
            return cls({}, 0.0, "an earlier version, which counted drafts a row or took all steps to draft")
        seconds = {int(row["tokens"]): float(row["seconds"]) for row in stored["steps"]}
        plain = {int(row["tokens"]): float(row["plain"]) for row in stored["steps"] if "plain" in row}
        per_position = float(stored["per_position"])
        if not all(s > 0 for s in [*seconds.values(), *plain.values()]) or not per_position >= 0:
            raise ValueError("a step that takes no time")
        return cls(seconds, per_position, str(stored["source"]), plain)

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as JSON.

        Raises:
          UserError: the file cannot be written.
        """
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(path, self.text())
        except OSError as error:
            raise UserError(f"the cost table {path} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> CostTable:
        """Reads what `save` wrote.

        Raises:
          UserError: there is no such file, or it holds no such table.
        """
        try:
            return cls.parse(Path(path).read_text())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no cost table ({error}): remove it, and the next start measures one") from error


def in_turn(steps: Sequence[S], time_step: Callable[[S], float]) -> dict[S, float]:
    """Seconds of each of some steps, timed in turn, A B C A B C.

    What is compared is a step with another, so each costs the median of the first ones times the median of its ratios
    to the first one beside it: a slow moment of the machine hits both.

    Args:
      steps: what tells the steps apart; the first is the plain one.
      time_step: takes it to the seconds of one step, timed now.
    """
    begin = time.perf_counter()
    times: dict[S, list[float]] = {step: [] for step in steps}
    first = times[steps[0]]
    while len(first) < LEAST_ROUNDS or (len(first) < ROUNDS and time.perf_counter() - begin < SECONDS):
        for step, found in times.items():
            found.append(time_step(step))
    plain = statistics.median(first)
    return {
        step: plain * statistics.median(a / b for a, b in zip(found, first, strict=True))
        for step, found in times.items()
    }
