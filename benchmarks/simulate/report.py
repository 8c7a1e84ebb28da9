"""The table and the picture of a simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def markdown(found: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"Simulation: {found['target']} in bfloat16 on data sheets, acceptances and confidences of {found['answers']}"
        " recorded answers of the built-in target; speed over plain decoding.",
        "",
        f"| chips | context | rows | k = {found['slots']} | best fixed k | by confidence | drafts a row | kappa |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for e in found["entries"]:
        chips = e["chip"] if e["chips"] == 1 else f"{e['chips']} x {e['chip']}"
        lines.append(
            f"| {chips} | {e['context']:,} | {e['rows']} | {e['fixed_k4']:.2f}x |"
            f" {e['best_fixed']:.2f}x (k = {e['best_fixed_k']}) | {e['ragged']:.2f}x | {e['ragged_drafts']:.2f} |"
            f" {e['ragged_kappa']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Speed over plain decoding by batch, a panel for each chip and context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = sorted({e["context"] for e in found["entries"]})
    chips = sorted({e["chip"] for e in found["entries"]})
    figure, axes = pyplot.subplots(
        len(contexts), len(chips), figsize=(9, 2.9 * len(contexts)), layout="constrained", sharey=True, squeeze=False
    )
    lines = {"fixed_k4": f"k = {found['slots']}", "best_fixed": "the best fixed k", "ragged": "shared by confidence"}
    for context, of_context in zip(contexts, axes, strict=True):
        for chip, ax in zip(chips, of_context, strict=True):
            entries = [e for e in found["entries"] if (e["chip"], e["context"]) == (chip, context)]
            rows = [e["rows"] for e in entries]
            for key, name in lines.items():
                ax.plot(rows, [e[key] for e in entries], "o-", markersize=4, label=name)
            ax.axhline(1, color="grey", linewidth=0.8)
            many = "" if entries[0]["chips"] == 1 else f"{entries[0]['chips']} x "
            ax.set(xscale="log", xlabel="rows", title=f"{many}{chip}, context {context:,}")
            ax.set_xticks(rows, labels=[str(n) for n in rows])
            ax.minorticks_off()
        of_context[0].set_ylabel("speed over plain, simulated")
    axes[0][0].legend()
    figure.savefig(path)
    pyplot.close(figure)
