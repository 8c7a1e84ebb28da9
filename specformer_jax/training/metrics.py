"""Metrics of a run: JSON lines, TensorBoard files and a picture of the curves."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from specformer_jax import files
from specformer_jax.errors import UserError
from specformer_jax.training.train_step import StepMetrics

log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends to metrics.jsonl; what a restart will compute again is cut off first."""

    def __init__(self, folder: Path, done: int, enabled: bool = True):
        """
        Args:
          folder: the run's folder.
          done: how many steps are done already; lines of later ones are dropped.
          enabled: whether anything is written; hosts other than the first write nothing.
        """
        self._folder = folder
        self._file: TextIO | None = None
        self._board: Any = None
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
        self._board = _board(folder)

    def add(self, step: int, steps: Sequence[StepMetrics], rate: float, learning_rate: float) -> None:
        """Writes a line, which survives a kill from then on: means over some steps, and the sum of their tokens.

        Args:
          step: the last of these steps.
          steps: the metrics of each of them, fetched from the device.
          rate: anchors a second, without what compiling took.
          learning_rate: that of the last step.
        """
        if self._file is None:
            return
        values = {name: np.asarray([getattr(m, name) for m in steps], np.float64) for name in StepMetrics._fields}
        row = {"step": step} | {name: value.mean(axis=0).round(6).tolist() for name, value in values.items()}
        # All digits of the loss: restarts are compared bit for bit.
        row |= {"loss": float(values["loss"].mean()), "tokens": float(values["tokens"].sum())}
        row |= {"tokens_per_second": round(rate, 1), "learning_rate": learning_rate}
        with self._disk():
            self._file.write(_line(row))
            self._file.flush()
        if self._board is not None:
            for name in ("loss", "kappa", "gradient_norm", "learning_rate"):
                self._board.add_scalar(name, float(row[name]), step)
            for j, accuracy in enumerate(row["slot_accuracy"]):
                self._board.add_scalar(f"accuracy/slot_{j}", accuracy, step)

    def close(self) -> None:
        """Ends the files, and draws curves.png where matplotlib is installed."""
        with self._disk():
            if self._file is not None:
                self._file.close()
                draw(self._folder)
            if self._board is not None:
                self._board.close()

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


def draw(folder: Path) -> None:
    """curves.png: loss, accuracy by slot and kappa over training tokens."""
    try:
        from matplotlib.figure import Figure  # not pyplot: a notebook keeps its own backend
    except ImportError:
        return
    rows = read(folder / "metrics.jsonl")
    if not rows:
        return
    tokens = np.cumsum([row["tokens"] for row in rows])
    width = max(1, len(rows) // 50)  # a moving mean over a fiftieth of the run
    smooth = lambda values: np.convolve(np.asarray(values), np.ones(width) / width, "valid")
    figure = Figure(figsize=(15, 4))
    axes = figure.subplots(1, 3)
    axes[0].plot(tokens[width - 1 :], smooth([row["loss"] for row in rows]))
    for j in range(len(rows[0]["slot_accuracy"])):
        axes[1].plot(tokens[width - 1 :], smooth([row["slot_accuracy"][j] for row in rows]), label=f"slot {j}")
    axes[1].legend()
    axes[2].plot(tokens[width - 1 :], smooth([row["kappa"] for row in rows]))
    for axis, title in zip(axes, ("loss", "accuracy by slot", "kappa on training answers"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("answer tokens trained on")
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=90)


def _board(folder: Path):
    """A TensorBoard writer where one is installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
