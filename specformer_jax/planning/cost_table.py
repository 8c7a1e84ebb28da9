"""What a decode step costs by rows and drafts, and how steps are timed side by side."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from specformer_jax import files
from specformer_jax.errors import UserError

log = logging.getLogger(__name__)

ROUNDS, LEAST_ROUNDS = 9, 5  # a measurement has so many, each of which goes through all k once
SECONDS = 3.0  # after which a measurement makes no more rounds than it must


@dataclasses.dataclass(frozen=True)
class CostTable:
    """How long a step takes.

    Attributes:
      seconds: the seconds of one step, by the rows of the batch and k.
      source: how the table was found, for people; a file is only read for the source it was written for.
    """

    seconds: Mapping[tuple[int, int], float]
    source: str

    @property
    def draft_lengths(self) -> list[int]:
        """The k of the table, ascending."""
        return sorted({k for _, k in self.seconds})

    def check(self, sizes: Sequence[int]) -> None:
        """Raises UserError unless it has every k for these batch sizes."""
        missing = [(size, k) for size in sizes for k in self.draft_lengths if (size, k) not in self.seconds]
        if missing:
            rows, k = missing[0]
            raise UserError(
                f"the cost table has no step of {rows} rows and {k} drafts: make it for this engine's sizes"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as JSON.

        Raises:
          UserError: the file cannot be written.
        """
        rows = [{"rows": rows, "k": k, "seconds": s} for (rows, k), s in sorted(self.seconds.items())]
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(path, json.dumps({"source": self.source, "steps": rows}, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"the cost table {path} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> CostTable:
        """Reads what `save` wrote.

        Raises:
          UserError: there is no such file, or it holds no such table.
        """
        try:
            stored = json.loads(Path(path).read_text())
            seconds = {(int(row["rows"]), int(row["k"])): float(row["seconds"]) for row in stored["steps"]}
            if not all(s > 0 for s in seconds.values()):
                raise ValueError("a step that takes no time")
            return cls(seconds, str(stored["source"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no cost table ({error}): remove it, and the next start measures one") from error


def in_turn(draft_lengths: Sequence[int], time_step: Callable[[int], float]) -> dict[int, float]:
    """Seconds of a step by k, the k timed in turn, A B C A B C.

    What is compared is a k with another, so a step costs the median of the plain ones times the median of its ratios to
    the plain step beside it: a slow moment of the machine hits both.

    Args:
      draft_lengths: the k to time, with 0 among them.
      time_step: takes k to the seconds of one step, timed now.
    """
    begin = time.perf_counter()
    times: dict[int, list[float]] = {k: [] for k in draft_lengths}
    while len(times[0]) < LEAST_ROUNDS or (len(times[0]) < ROUNDS and time.perf_counter() - begin < SECONDS):
        for k, found in times.items():
            found.append(time_step(k))
    plain = statistics.median(times[0])
    return {
        k: plain * statistics.median(a / b for a, b in zip(found, times[0], strict=True)) for k, found in times.items()
    }
