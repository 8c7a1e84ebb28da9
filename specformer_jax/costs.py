"""What a decode step costs by rows and drafts: measured on this device, read from a file, or from a data sheet."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from specformer_jax import files
from specformer_jax.config import UserError
from specformer_jax.model import Model, Params
from specformer_jax.slots import Programs
from specformer_jax.state import DecodeState, midway

log = logging.getLogger(__name__)

ROUNDS, LEAST_ROUNDS = 9, 5  # of a measurement; each goes through all k once
SECONDS = 3.0  # after which a measurement makes no more rounds than it must


@dataclasses.dataclass(frozen=True)
class CostTable:
    """Seconds of one step.

    Attributes:
      seconds: by (rows of the batch, k).
      source: how it was found, for people; a file is only read for the source it was written for.
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
          UserError: there is no such table.
        """
        try:
            stored = json.loads(Path(path).read_text())
            seconds = {(int(row["rows"]), int(row["k"])): float(row["seconds"]) for row in stored["steps"]}
            if not all(s > 0 for s in seconds.values()):
                raise ValueError("a step that takes no time")
            return cls(seconds, str(stored["source"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no cost table ({error}): remove it, and the next start measures one") from error


def load_or_measure(programs: Programs, path: str | os.PathLike | None) -> CostTable:
    """The table of a file, if it was measured on the same; else a new one, which is written there.

    Raises:
      UserError: a file that holds something else, or cannot be written.
    """
    if path is not None and Path(path).exists():
        table = CostTable.load(path)
        wanted = {(size, k) for size in programs.sizes for k in programs.draft_lengths}
        if table.source == source(programs) and wanted <= table.seconds.keys():
            return table
        log.info("%s was measured on something else: measuring anew", path)
    table = measure(programs)
    if path is not None:
        table.save(path)
    return table


def measure(programs: Programs) -> CostTable:
    """Times every step program that serving can call; the rows stand in the middle of their context and never end."""
    seconds: dict[tuple[int, int], float] = {}
    for size in programs.sizes:
        state = programs.empty(size)

        def time_step(k: int) -> float:
            nonlocal state
            state, step = _time_call(programs, state, k)
            return step

        seconds |= {(size, k): step for k, step in in_turn(programs.draft_lengths, time_step).items()}
    return CostTable(seconds, source(programs))


def in_turn(draft_lengths: Sequence[int], time_step: Callable[[int], float]) -> dict[int, float]:
    """Seconds of a step by k, the k timed in turn, A B C A B C.

    What is compared is a k with another, so a step costs the median of the plain ones times the median of its ratios to
    the plain step beside it: a slow moment of the machine hits both.

    Args:
      draft_lengths: with 0 among them.
      time_step: k -> the seconds of one step, timed now.
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


def measure_step(programs: Programs, size: int, draft_length: int) -> float:
    """Seconds of one step of one program, the median of a few."""
    state, found = programs.empty(size), []
    for _ in range(LEAST_ROUNDS):
        state, step = _time_call(programs, state, draft_length)
        found.append(step)
    return statistics.median(found)


def _time_call(programs: Programs, state: DecodeState, draft_length: int) -> tuple[DecodeState, float]:
    """One call with every row running, and the seconds of each of its steps."""
    state = jax.block_until_ready(midway(state, programs.context // 2))
    begin = time.perf_counter()
    state, report, _ = programs.advance(state, np.zeros(state.done.shape, bool), min(2, programs.steps), draft_length)
    steps = int(jax.device_get(report.steps).max())
    return state, (time.perf_counter() - begin) / max(steps, 1)


def source(programs: Programs) -> str:
    """What a measured table depends on."""
    device, head = jax.devices()[0], programs.model.head
    leaves = jax.tree.leaves(programs.params)
    size = sum(leaf.size for leaf in leaves)
    placed = leaves[0].sharding
    layout = f" as {dict(placed.mesh.shape)}" if isinstance(placed, jax.sharding.NamedSharding) else ""
    drafter = "no drafter" if head is None else f"{head.config.drafter} drafts ({type(head).__name__})"
    return (
        f"measured on {len(leaves[0].devices())} x {device.device_kind}{layout}, {programs.model.target.dtype},"
        f" {size} parameters, {drafter}, {programs.context} positions, {programs.steps} steps a call"
    )


@dataclasses.dataclass(frozen=True)
class Device:
    """A data sheet: bfloat16 FLOP/s without sparsity, and bytes/s of its memory."""

    peak: float
    bandwidth: float

    @property
    def rho(self) -> float:
        """The redundancy ratio: tokens a pass may read per weight before compute binds (bfloat16 weights)."""
        return self.peak / self.bandwidth  # (FLOP/s / bytes/s) / (2 FLOP a weight / 2 bytes a weight)


DEVICES = {
    "TPU v4": Device(275e12, 1228e9),
    "TPU v5e": Device(197e12, 819e9),
    "TPU v5p": Device(459e12, 2765e9),
    "TPU v6e": Device(918e12, 1640e9),
    "TPU7x": Device(2307e12, 7380e9),
    "A100": Device(312e12, 2039e9),
    "H100": Device(989e12, 3350e9),
}


def from_data_sheet(
    model: Model, params: Params, device: Device, *, sizes: Sequence[int], draft_lengths: Sequence[int], chips: int = 1
) -> CostTable:
    """Steps of a device that is not here: the larger of the time to read the weights and the time to compute.

    Reading the cache is left out, so long contexts cost more than this says, at every k alike.
    """

    def count(tree) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    target = count(params["target"])
    untied = "lm_head" in params["target"]
    vocabulary = params["target"]["embedding"].size
    weights = target - vocabulary if untied else target  # a gathered embedding is not read
    head, pruned = count(params.get("draft", {})), params.get("draft_vocab", {}).get("lm_head")
    draft_vocabulary = vocabulary if pruned is None else pruned.size
    bytes_each = 2 if model.target.dtype == "bfloat16" else 4
    seconds = {}
    for rows in sizes:
        for k in draft_lengths:
            read = weights + head + (draft_vocabulary if k else 0)
            computed = rows * ((k + 1) * (weights + head) + k * draft_vocabulary)
            seconds[rows, k] = max(read * bytes_each / device.bandwidth, 2 * computed / device.peak) / chips
    return CostTable(seconds, f"data sheet: {chips} x {device.peak:.3g} FLOP/s, {device.bandwidth:.3g} bytes/s")
