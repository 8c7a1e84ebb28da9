"""Metrics of a run as JSON lines that survive a kill, and on the boards that draw them while it trains."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TextIO

import numpy as np

from specformer_jax import files
from specformer_jax.errors import UserError
from specformer_jax.training.train_step import StepMetrics

log = logging.getLogger(__name__)


class Board(Protocol):
    """What draws a run's curves while it trains."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step, by name."""

    def close(self) -> None:
        """The run has ended."""


class MetricsWriter:
    """Appends to metrics.jsonl; what a restart will compute again is cut off first."""

    def __init__(self, folder: Path, done: int, enabled: bool = True, boards: Sequence[Board] = ()):
        """
        Args:
          folder: the run's folder.
          done: how many steps are done already; lines of later ones are dropped.
          enabled: whether anything is written; hosts other than the first write nothing.
          boards: what shows the values, too.
        """
        self._folder, self._boards = folder, boards
        self._file: TextIO | None = None
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        with self._disk():
            folder.mkdir(parents=True, exist_ok=True)
            kept = [row for row in read(path) if row["step"] <= done]
            if done and (not kept or kept[-1]["step"] != done):
                log.warning("%s has no line of step %s, where the run goes on: lines are missing", path, done)
            files.write_whole(path, "".join(map(_line, kept)))
            self._file = path.open("a")

    def add(
        self,
        step: int,
        steps: Sequence[StepMetrics],
        rate: float,
        learning_rate: float,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Writes a line, which survives a kill from then on: means over some steps, and the sum of their tokens.

        Args:
          step: the last of these steps.
          steps: the metrics of each of them, fetched from the device.
          rate: anchors a second, without what compiling took.
          learning_rate: that of the last step.
          more: what else the line says: "seconds" by part, "mfu", "held_out".
        """
        if self._file is None:
            return
        values = {name: np.asarray([getattr(m, name) for m in steps], np.float64) for name in StepMetrics._fields}
        row = {"step": step} | {name: value.mean(axis=0).round(6).tolist() for name, value in values.items()}
        # All digits of the loss: restarts are compared bit for bit.
        row |= {"loss": float(values["loss"].mean()), "tokens": float(values["tokens"].sum())}
        row |= {"tokens_per_second": round(rate, 1), "learning_rate": learning_rate, **more}
        with self._disk():
            self._file.write(_line(row))
            self._file.flush()
        shown = dict(flat(row))
        for board in self._boards:
            board.add(step, shown)

    def close(self) -> None:
        """Ends the file, and what the boards show."""
        with self._disk():
            if self._file is not None:
                self._file.close()
            for board in self._boards:
                board.close()

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Raises UserError where the disk is full or refuses otherwise."""
        try:
            yield
        except OSError as error:
            raise UserError(f"metrics cannot be written to {self._folder}: {error}") from error


def _line(row: dict) -> str:
    return json.dumps(files.seal(row)) + "\n"


def read(path: str | Path) -> list[dict]:
    """The rows of a metrics.jsonl; a half-written last line is left out, a damaged one, too, with a warning."""
    rows = []
    for number, line in enumerate(files.whole_lines(path), 1):
        where = f"{path}, line {number}"
        try:
            row = files.unseal(where, json.loads(line))
            rows += [row] if row["step"] >= 0 else []
        except (UserError, ValueError, AttributeError, KeyError, TypeError) as error:
            log.warning("%s is left out: %s", where, error)
    return rows


def flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row, each under one name.

    >>> dict(flat({"step": 3, "loss": 1.5, "slot_loss": [2.0, 1.0], "seconds": {"data": 0.1}}))
    {'loss': 1.5, 'slot_loss/0': 2.0, 'slot_loss/1': 1.0, 'seconds/data': 0.1}
    """
    for name, value in row.items():
        if isinstance(value, (list, Mapping)):
            inner = value if isinstance(value, Mapping) else {str(j): entry for j, entry in enumerate(value)}
            yield from flat(inner, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield prefix + name, float(value)
