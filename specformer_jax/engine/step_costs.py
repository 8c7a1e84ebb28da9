"""The cost table of an engine's own compiled steps: timed on this device, or read from the file of an earlier start."""

from __future__ import annotations

import logging
import os
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from specformer_jax.decoding.state import DecodeState, midway
from specformer_jax.engine.compiled_steps import CompiledSteps
from specformer_jax.planning.cost_table import LEAST_ROUNDS, CostTable, in_turn

log = logging.getLogger(__name__)


def load_or_measure(compiled_steps: CompiledSteps, path: str | os.PathLike | None) -> CostTable:
    """The table that a file holds, if it was measured on the same; else a new one, which is written there.

    Raises:
      UserError: the file holds something else, or cannot be written.
    """
    if path is not None and Path(path).exists():
        table = CostTable.load(path)
        wanted = {(size, k) for size in compiled_steps.sizes for k in compiled_steps.draft_lengths}
        if table.source == source(compiled_steps) and wanted <= table.seconds.keys():
            return table
        log.info("%s was measured on something else: measuring anew", path)
    table = measure(compiled_steps)
    if path is not None:
        table.save(path)
    return table


def measure(compiled_steps: CompiledSteps) -> CostTable:
    """Times every compiled step that serving can call; the rows stand in the middle of their context and never end."""
    seconds: dict[tuple[int, int], float] = {}
    for size in compiled_steps.sizes:
        state = compiled_steps.empty(size)

        def time_step(k: int) -> float:
            nonlocal state
            state, step = _time_call(compiled_steps, state, k)
            return step

        seconds |= {(size, k): step for k, step in in_turn(compiled_steps.draft_lengths, time_step).items()}
    return CostTable(seconds, source(compiled_steps))


def measure_step(compiled_steps: CompiledSteps, size: int, draft_length: int) -> float:
    """Seconds of one step at one batch size and one k, the median of a few."""
    state, found = compiled_steps.empty(size), []
    for _ in range(LEAST_ROUNDS):
        state, step = _time_call(compiled_steps, state, draft_length)
        found.append(step)
    return statistics.median(found)


def _time_call(compiled_steps: CompiledSteps, state: DecodeState, draft_length: int) -> tuple[DecodeState, float]:
    """One call with every row running, and the seconds of each of its steps."""
    state = jax.block_until_ready(midway(state, compiled_steps.context // 2))
    begin = time.perf_counter()
    state, report, _ = compiled_steps.advance(
        state, np.zeros(state.done.shape, bool), min(2, compiled_steps.steps), draft_length
    )
    steps = int(jax.device_get(report.steps).max())
    return state, (time.perf_counter() - begin) / max(steps, 1)


def source(compiled_steps: CompiledSteps) -> str:
    """What a measured table depends on."""
    device, drafter = jax.devices()[0], compiled_steps.model.drafter
    leaves = jax.tree.leaves(compiled_steps.params)
    size = sum(leaf.size for leaf in leaves)
    placed = leaves[0].sharding
    layout = f" as {dict(placed.mesh.shape)}" if isinstance(placed, jax.sharding.NamedSharding) else ""
    drafts = "no drafter" if drafter is None else f"{drafter.config.drafter} drafts ({type(drafter).__name__})"
    return (
        f"measured on {len(leaves[0].devices())} x {device.device_kind}{layout}, {compiled_steps.model.target.dtype},"
        f" {size} parameters, {drafts}, {compiled_steps.context} positions, {compiled_steps.steps} steps a call"
    )
