"""The numbers of `benchmarks.decode`: from runs to ratios, and from ratios to the paper's table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.contestants import Contestant, Run


def paired(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios of what ran side by side: a slow minute of the machine hits both.

    >>> paired([10.0, 30.0, 5.0], [5.0, 10.0, 5.0])
    2.0
    """
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def together(runs: Sequence[Run], other: Sequence[Run]) -> float:
    """Throughput over all rounds, tokens of all by seconds of all, against another contestant's."""
    rate, under = (sum(run.tokens for run in some) / sum(run.seconds for run in some) for some in (runs, other))
    return rate / under


def differing(answers: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Tokens from each answer's first difference on, and answers that have one.

    >>> differing([[1, 2, 3], [4, 5]], [[1, 9, 3], [4, 5]])
    (2, 1)
    """
    tokens, parted = 0, 0
    for got, wanted in zip(answers, reference, strict=True):
        longest = max(len(got), len(wanted))
        same = next(
            (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted))
        )
        tokens += longest - same
        parted += same < longest
    return tokens, parted


def entry(
    contestant: Contestant, batch_size: int, runs: Sequence[Run], plain: Sequence[Run], baselines: dict[str, list[Run]]
) -> dict[str, Any]:
    """One contestant at one batch size; run i stands beside run i of `plain` and of each baseline.

    kappa = tokens a row commits per target pass; speedup = throughput over plain decoding's; theta = kappa / speedup,
    what the drafts' own cost eats; break_even_kappa = step time over plain's: below it drafting does not pay.
    """
    steps = [run.decode_seconds / max(run.passes, 1) for run in runs]
    plain_steps = [run.decode_seconds / max(run.passes, 1) for run in plain]
    rates = [run.tokens / run.seconds for run in runs]
    speedup = paired(rates, [run.tokens / run.seconds for run in plain])
    passes = max(sum(run.row_passes for run in runs), 1)
    kappa = sum(run.tokens - len(run.answers) for run in runs) / passes
    pairs = [differing(run.answers, other.answers) for run, other in zip(runs, plain, strict=True)]
    return {
        "batch_size": batch_size,
        "contestant": contestant.name,
        "draft_length": contestant.draft_length,
        "tokens_per_second": round(statistics.median(rates), 2),
        "speedup": round(speedup, 3),
        "kappa": round(kappa, 3),
        "acceptance": [round(sum(a) / passes, 4) for a in zip(*(run.accepted for run in runs), strict=True)],
        "theta": round(kappa / speedup, 3),
        "step_ms": round(statistics.median(steps) * 1e3, 2),
        "break_even_kappa": round(paired(steps, plain_steps), 3),
        "speedup_over": {
            name: round(paired(rates, [run.tokens / run.seconds for run in other]), 3)
            for name, other in baselines.items()
            if name != contestant.name
        },
        "all_rounds_over": {
            name: round(together(runs, other), 3)
            for name, other in {"plain": plain, **baselines}.items()
            if name != contestant.name
        },
        "answers": sum(len(run.answers) for run in runs),
        "answers_that_part_from_plain": sum(parted for _, parted in pairs),
        "tokens": sum(run.tokens for run in runs),
        "tokens_from_the_parting_on": sum(tokens for tokens, _ in pairs),
        "seconds": [round(run.seconds, 4) for run in runs],
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as text: the paper's Table 1 (methods down, batch sizes across), then what stands behind it."""
    entries = report["entries"]
    sizes = list(dict.fromkeys(e["batch_size"] for e in entries))
    names = list(dict.fromkeys(e["contestant"] for e in entries))
    found = {(e["contestant"], e["batch_size"]): e for e in entries}
    m = report["machine"]
    parts = [
        f"{report['target']}, {report['dtype']}, head {report['draft'] or 'none'}, "
        f"temperature {report['temperature']}, {report['max_new_tokens']} new tokens at most. "
        f"{m['device']}, {m['cores']} cores: "
        f"{m['gemm_gflops']} GFLOP/s, {m['copy_gbytes']} GB/s, rho = {m['rho']}: "
        + ", ".join(f"k <= {m['rho'] / size:.1f} at batch {size}" for size in sizes)
        + ".",
        "",
        "Speed-up over plain decoding of this project, median of the ratios of paired rounds:",
        "",
        _row(["method", *(f"batch {size}: speed-up / kappa / theta" for size in sizes)]),
        _row(["---"] * (len(sizes) + 1)),
    ]
    for name in names:
        cells = [found.get((name, size)) for size in sizes]
        shown = ["" if e is None else f"**{e['speedup']:.2f}x** / {e['kappa']:.2f} / {e['theta']:.2f}" for e in cells]
        parts.append(_row([name, *shown]))
    parts += [
        "",
        _row(["batch", "method", "k", "tokens/s", "ms a pass", "break-even kappa", "kappa", "accepted by position",
              "over the baselines", "all rounds together", "same tokens as plain"]),
        _row(["---"] * 11),
    ]  # fmt: skip
    for e in entries:
        parts.append(
            _row(
                [
                    str(e["batch_size"]),
                    e["contestant"],
                    "" if e["draft_length"] is None else str(e["draft_length"]),
                    f"{e['tokens_per_second']:.1f}",
                    f"{e['step_ms']:.1f}",
                    f"{e['break_even_kappa']:.2f}",
                    f"{e['kappa']:.2f}",
                    " ".join(f"{share:.0%}" for share in e["acceptance"]),
                    _ratios(e["speedup_over"]),
                    _ratios(e["all_rounds_over"]),
                    _sameness(e),
                ]
            )
        )
    return "\n".join(parts) + "\n"


def _ratios(over: dict[str, float]) -> str:
    return ", ".join(f"{ratio:.2f}x {name}" for name, ratio in over.items())


def _sameness(e: dict[str, Any]) -> str:
    if not e["answers_that_part_from_plain"]:
        return f"all {e['answers']} answers"
    return f"{e['answers'] - e['answers_that_part_from_plain']} of {e['answers']} answers"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
