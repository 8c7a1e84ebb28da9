"""The pictures of `benchmarks.decode` (extra `bench`): the paper's Figure 1, and the speed-up with its break-even."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specformer_jax.errors import UserError


def plot(report: dict[str, Any], path: str | Path) -> list[Path]:
    """Writes the pictures of a report.

    Args:
      report: of `benchmarks.decode`.
      path: a file takes all three side by side; a directory takes `throughput_by_batch.svg`,
        `throughput_by_window.svg` and `speedup_by_batch.svg`.

    Returns:
      The files written.

    Raises:
      UserError: matplotlib is not installed, or no picture can be written there.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install -e '.[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawings = {
        "throughput_by_batch": throughput_by_batch,
        "throughput_by_window": throughput_by_window,
        "speedup_by_batch": speedup_by_batch,
    }
    path = Path(path)
    try:
        if path.suffix:
            figure, axes = pyplot.subplots(1, len(drawings), figsize=(15, 4.2), layout="constrained")
            for draw, ax in zip(drawings.values(), axes, strict=True):
                draw(report, ax)
            figure.savefig(path)
            pyplot.close(figure)
            return [path]
        path.mkdir(parents=True, exist_ok=True)
        for name, draw in drawings.items():
            figure, ax = pyplot.subplots(figsize=(5.5, 4.2), layout="constrained")
            draw(report, ax)
            figure.savefig(path / f"{name}.svg")
            pyplot.close(figure)
        return [path / f"{name}.svg" for name in drawings]
    except (OSError, ValueError) as error:
        raise UserError(f"no picture can be written to {path}: {error}") from error


def throughput_by_batch(report: dict[str, Any], ax) -> None:
    """Tokens a second of every contestant over the batch size."""
    for name, entries in _by(report["entries"], "contestant").items():
        ax.plot([e["batch_size"] for e in entries], [e["tokens_per_second"] for e in entries], "o-", label=name)
    _finish(ax, "rows of the batch", "tokens / s", _sizes(report))


def throughput_by_window(report: dict[str, Any], ax) -> None:
    """Tokens a second over the tokens that a pass reads for each request, 1 + k; a line a batch size."""
    drafting = [e for e in report["entries"] if e["contestant"] in ("plain", f"k = {e['draft_length']}")]
    for size, entries in _by(drafting, "batch_size").items():
        entries = sorted(entries, key=lambda e: e["draft_length"])
        ax.plot(
            [e["draft_length"] + 1 for e in entries],
            [e["tokens_per_second"] for e in entries],
            "o-",
            label=f"batch {size}",
        )
    windows = sorted({e["draft_length"] + 1 for e in drafting})
    _finish(ax, "tokens of a request in a pass (1 + drafts)", "tokens / s", windows)


def speedup_by_batch(report: dict[str, Any], ax) -> None:
    """Speed-up over plain decoding; dotted, of the decoding alone: kappa over its break-even. At 1 drafting pays."""
    drafting = [e for e in report["entries"] if e["draft_length"]]
    for name, entries in _by(drafting, "contestant").items():
        sizes = [e["batch_size"] for e in entries]
        [line] = ax.plot(sizes, [e["speedup"] for e in entries], "o-", label=name)
        ax.plot(sizes, [e["kappa"] / e["break_even_kappa"] for e in entries], ":", color=line.get_color())
    ax.plot([], [], ":", color="grey", label="kappa / break-even kappa")
    ax.axhline(1.0, color="black", linewidth=1, label="break-even")
    _finish(ax, "rows of the batch", "speed-up over plain decoding", _sizes(report))


def _by(entries: list[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for e in entries:
        groups.setdefault(e[key], []).append(e)
    return groups


def _sizes(report: dict[str, Any]) -> list[int]:
    return sorted({e["batch_size"] for e in report["entries"]})


def _finish(ax, x: str, y: str, ticks: list[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, list(map(str, ticks)))
    ax.minorticks_off()
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
