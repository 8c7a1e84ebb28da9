"""A run's curves as pictures, where matplotlib is installed (extra `train`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]  # of metrics.jsonl


def draw(rows: Sequence[Row]) -> Any | None:
    """A matplotlib figure of all curves; None without matplotlib, or without a row."""
    try:
        from matplotlib.figure import Figure  # not pyplot: a notebook keeps its own backend
    except ImportError:
        return None
    if not rows:
        return None
    figure = Figure(figsize=(15, 8), layout="constrained")
    for axis, (title, panel) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        panel(axis, rows)
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    return figure


def svg(figure: Any) -> str:
    """The figure as an SVG element of a page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _smooth(axis: Any, rows: Sequence[Row], name: str, **style: Any) -> None:
    """A moving mean over a fiftieth of the run, by training tokens."""
    tokens = np.cumsum([row["tokens"] for row in rows])
    width = max(1, len(rows) // 50)
    values = np.convolve(np.asarray([row[name] for row in rows]), np.ones(width) / width, "valid")
    axis.plot(tokens[width - 1 :], values, marker="." if len(values) < 12 else "", **style)
    axis.set_xlabel("answer tokens trained on", fontsize=9)


def _loss(axis: Any, rows: Sequence[Row]) -> None:
    _smooth(axis, rows, "loss")


def _slots(axis: Any, rows: Sequence[Row]) -> None:
    for j in range(len(rows[0]["slot_accuracy"])):
        _smooth(axis, [row | {"slot": row["slot_accuracy"][j]} for row in rows], "slot", label=f"slot {j}")


def _kappa(axis: Any, rows: Sequence[Row]) -> None:
    _smooth(axis, rows, "kappa", label="training batches, all positions", color="0.6")
    tokens = dict(zip((row["step"] for row in rows), np.cumsum([row["tokens"] for row in rows]), strict=True))
    counted = [row for row in rows if "held_out" in row]
    if not counted:
        return
    at = [tokens[row["step"]] for row in counted]
    draw = lambda values, label: axis.plot(at, values, marker="o", markersize=3, label=label)
    draw([row["held_out"]["kappa"] for row in counted], "held out, all slots")
    for budget in counted[-1]["held_out"]["kappa_by_budget"]:
        values = [row["held_out"]["kappa_by_budget"][budget] for row in counted]
        draw(values, f"held out, {budget} a row by confidence")


def _optimizer(axis: Any, rows: Sequence[Row]) -> None:
    _smooth(axis, rows, "gradient_norm", label="norm of the gradient")
    _smooth(axis, rows, "learning_rate", label="learning rate")
    axis.set_yscale("log", nonpositive="mask")


def _seconds(axis: Any, rows: Sequence[Row]) -> None:
    rows = [row for row in rows if "seconds" in row]
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    shares = [[row["seconds"].get(name, 0.0) for row in rows] for name in names]
    if rows:
        axis.stackplot([row["step"] for row in rows], np.cumsum(shares, axis=1), labels=names, alpha=0.8)
        axis.set_xlabel("step", fontsize=9)


def _rate(axis: Any, rows: Sequence[Row]) -> None:
    axis.plot([row["step"] for row in rows], [row["tokens_per_second"] for row in rows])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step", fontsize=9)


PANELS: dict[str, Callable[[Any, Sequence[Row]], None]] = {
    "Loss": _loss,
    "kappa": _kappa,
    "Accuracy by slot, training batches": _slots,
    "Gradient and learning rate": _optimizer,
    "Seconds by part, summed up": _seconds,
    "Answer tokens a second": _rate,
}
