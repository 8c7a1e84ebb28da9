"""Part 7: what the measured costs of steps and the recorded acceptances promise for a target without a trained head.

A projection, and no measurement: the recorded answers are the built-in model's, replayed in rows that are always full,
each step at the cost that part 5 measured for the larger target.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.accelerator.bench import Bench, Unit
from benchmarks.accelerator.findings import Figures
from benchmarks.simulate.__main__ import RECORDING
from benchmarks.simulate.recording import Recording
from benchmarks.simulate.replay import replay
from specformer_jax.decoding.state import BINS
from specformer_jax.planning.calibration import Calibration


class MeasuredSteps:
    """What a step of one batch costs, between and beyond the measured ones by straight lines."""

    def __init__(self, steps: Sequence[Figures]):
        """`steps` are those of part 5 for a batch."""
        self._of: dict[tuple[bool, int], list[tuple[int, float]]] = {}
        for step in sorted(steps, key=lambda step: step["tokens_a_row"]):
            kind = self._of.setdefault((step["plain"], step["context"]), [])
            kind.append((step["tokens_a_row"], step["microseconds"] * 1e-6))

    def seconds(self, tokens: int, rows: int, positions: int, drafts: bool) -> float:
        """The seconds of a step, as `Roofline.seconds` has it."""
        by_context = []
        for (plain, context), points in sorted(self._of.items()):
            # A step that drafts is timed from two tokens a row on: those with fewer take little less.
            kept = [point for point in points if plain or point[0] > 1]
            if plain != drafts and kept:
                by_context.append((context, float(np.interp(tokens / rows, *zip(*kept, strict=True)))))
        (low, short), (high, long) = by_context[0], by_context[-1]
        slope = (long - short) / (high - low) if high > low else 0.0
        return max(short + slope * (positions / rows - low), min(short, long) / 2)

    def contexts(self) -> list[int]:
        """Those that were measured plainly and with drafts."""
        plain, drafting = ({context for kind, context in self._of if kind is wanted} for wanted in (True, False))
        return sorted(plain & drafting)


def units(bench: Bench) -> Iterator[Unit]:
    recording = functools.cache(lambda: Recording.load(RECORDING))
    name = bench.sizes.projected
    for batch in bench.sizes.batches:
        measured = bench.findings.of("steps").get(f"{name}, batch {batch}", {})
        if steps := measured.get("steps"):
            yield Unit(f"{name}, batch {batch}", 5, functools.partial(project, recording, steps, batch))


def project(recording, steps: Sequence[Figures], rows: int) -> Figures:
    """Every policy's tokens a second over plain decoding's, by context."""
    learned, asked = recording().halves()
    calibration, cost = Calibration(asked.slots, BINS), MeasuredSteps(steps)
    calibration.observe(learned.outcomes())
    found = {}
    for context in cost.contexts():
        policies = {**{f"k = {k}": k for k in range(asked.slots + 1)}, "by confidence": None}
        rates = {name: replay(asked, calibration, cost, rows, context, k) for name, k in policies.items()}
        plain = rates["k = 0"]["tokens_per_second"]
        found[str(context)] = {name: round(rate["tokens_per_second"] / plain, 3) for name, rate in rates.items()} | {
            "drafts a row": round(rates["by confidence"]["drafts_per_row"], 3),
            "kappa": round(rates["by confidence"]["kappa"], 3),
            "tokens a second": round(rates["by confidence"]["tokens_per_second"], 1),
        }
    return {"projected_speedup": found}
