"""The table and the plot of what was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accelerator.findings import Figures, Findings
from specformer_jax import files


def write(findings: Findings) -> None:
    """`report.md` and, where matplotlib is installed and steps were timed, `report.svg` beside the JSON."""
    files.write_whole(findings.folder / "report.md", markdown(findings))
    if findings.of("steps"):
        plot(findings, findings.folder / "report.svg")


def markdown(findings: Findings) -> str:
    """Everything in tables, then what failed and what was left out."""
    run = findings.run
    title = f"{run['device']}, jax {run['jax']}, Python {run['python']}"
    lines = [title + (": a dry run on a CPU, whose times mean nothing." if run["dry"] else ".")]
    sections = {
        "The device": ceilings,
        "Kernels against their references": forms,
        "The same tokens with drafts and without, float32": lossless,
        "Tile sizes": tiles,
        "A step": steps,
        "Whole answers of the built-in model": answers,
        "Projection, no measurement: recorded acceptances of the built-in model at these steps' costs": projection,
    }
    parts = ("ceilings", "forms", "lossless", "tiles", "steps", "answers", "projection")
    for part, (heading, section) in zip(parts, sections.items(), strict=True):
        if found := findings.of(part):
            lines += ["", f"## {heading}", "", *section(found)]
    for heading, found in (("Failed", findings.failures()), ("Left out", findings.left_out())):
        if found:
            lines += ["", f"## {heading}", "", *(f"- {line}" for line in found)]
    return "\n".join(lines) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """The lines of a table.

    >>> list(table(["a", "b"], [[1, 2.5]]))
    ['| a | b |', '|---|---|', '| 1 | 2.5 |']
    """
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |"


def ceilings(found: dict[str, Figures]) -> Iterator[str]:
    rows = []
    for unit, figures in found.items():
        shown = [f"{name} {value}" for name, value in figures.items() if name not in ("seconds", "bytes")]
        rows.append([unit, ", ".join(shown)])
    return table(["", ""], rows)


def forms(found: dict[str, Figures]) -> Iterator[str]:
    columns = ["kernel", "form", "error", "tokens that differ", "within", "us", "share of the ceiling"]
    rows = []
    for unit, figures in found.items():
        if "not_run" in figures:
            rows.append([unit, figures["not_run"]])
        for form, f in figures.get("forms", {}).items():
            if "failed_to_compile" in f:
                rows.append([unit, form, f["failed_to_compile"]])
                continue
            within = "yes" if f["within"] else "**NO**"
            share = f.get("share_of_ceiling")
            rows.append(
                [unit, form, f"{f['error']:.1e}", f.get("tokens_that_differ"), within, f["microseconds"], share]
            )
    return table(columns, [row + [None] * (len(columns) - len(row)) for row in rows])


def lossless(found: dict[str, Figures]) -> Iterator[str]:
    columns = ["", "tokens compared", "tokens that differ", "beside a CPU: tokens", "that differ"]
    rows = []
    for unit, f in found.items():
        cpu = f.get("beside a CPU", {})
        rows.append([unit, *(x.get(name) for x in (f, cpu) for name in ("tokens compared", "tokens that differ"))])
    return table(columns, rows)


def tiles(found: dict[str, Figures]) -> Iterator[str]:
    rows = []
    for unit, f in found.items():
        if "not_run" in f:
            rows.append([unit, f["not_run"], None, None, None])
            continue
        best = "those in use" if f["tiles"] is None else ", ".join(f"{name} {n}" for name, n in f["tiles"].items())
        after = f.get("microseconds_after", f["microseconds_before"])
        for case, before in f["microseconds_before"].items():
            rows.append([unit, best, case, before, after[case]])
    return table(["kernel", "best", "case", "us before", "us after"], rows)


def steps(found: dict[str, Figures]) -> Iterator[str]:
    columns = [
        "target, batch", "context", "tokens a row", "ms", "over plain", "GB/s", "TFLOP/s", "over the roofline"
    ]  # fmt: skip
    rows = []
    for unit, figures in found.items():
        timed = figures.get("steps", [])
        plain = {f["context"]: f["microseconds"] for f in timed if f["plain"]}
        for f in timed:
            over = f"{f['microseconds'] / plain[f['context']]:.2f}x" if f["context"] in plain else None
            tokens = "1, plain" if f["plain"] else str(f["tokens_a_row"])
            reached = [f["gbytes_per_second"], f["tflops"], f.get("over_roofline")]
            rows.append([unit, f["context"], tokens, f"{f['microseconds'] / 1e3:.3f}", over, *reached])
        for context, reason in figures.get("contexts_left_out", {}).items():
            rows.append([unit, context, reason, *[None] * 5])
        rows += [[unit, None, failed, *[None] * 5] for failed in figures.get("failed_steps", [])]
    return table(columns, rows)


def answers(found: dict[str, Figures]) -> Iterator[str]:
    columns = ["", "", "tokens/s", "over plain", "kappa", "ms a pass", "same tokens as plain"]
    rows = []
    for unit, figures in found.items():
        for e in figures["contestants"]:
            same = f"{e['answers'] - e['answers_that_part_from_plain']} of {e['answers']} answers"
            rate = f"{e['tokens_per_second']:.0f}"
            rows.append([unit, e["contestant"], rate, f"{e['speedup']:.2f}x", e["kappa"], e["step_ms"], same])
    return table(columns, rows)


def projection(found: dict[str, Figures]) -> Iterator[str]:
    rows, columns = [], []
    for unit, figures in found.items():
        for context, of_context in figures["projected_speedup"].items():
            columns = ["target, batch", "context", *of_context]
            rows.append([unit, context, *of_context.values()])
    return table(columns, rows)


def plot(findings: Findings, path: Path) -> None:
    """A step over a plain one by batch, a panel for each target and context; nothing where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, int], dict[int, list[tuple[int, float]]]] = {}
    for unit, figures in findings.of("steps").items():
        target, batch = unit.split(", batch ")
        timed = figures.get("steps", [])
        plain = {f["context"]: f["microseconds"] for f in timed if f["plain"]}
        for f in timed:
            if not f["plain"] and f["context"] in plain:
                lines = panels.setdefault((target, f["context"]), {})
                ratio = f["microseconds"] / plain[f["context"]]
                lines.setdefault(f["tokens_a_row"], []).append((int(batch), ratio))
    if not panels:
        return
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3.4), layout="constrained", sharey=True, squeeze=False
    )
    for ax, ((target, context), lines) in zip(axes[0], panels.items(), strict=True):
        for tokens, points in sorted(lines.items()):
            ax.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label=f"{tokens} tokens a row")
        ax.axhline(1, color="grey", linewidth=0.8)
        ax.set(xscale="log", xlabel="rows", title=f"{target}, context {context:,}")
    axes[0][0].set_ylabel("a step over a plain one")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path)
    pyplot.close(figure)
