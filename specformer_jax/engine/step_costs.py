"""What an engine's own compiled steps cost: timed on this device, or read from the file of an earlier start."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from specformer_jax.decoding.program_store import ProgramStore
from specformer_jax.decoding.state import BINS, DecodeState, midway
from specformer_jax.engine.compiled_steps import CompiledSteps
from specformer_jax.planning.budgets import StepBudget
from specformer_jax.planning.calibration import Calibration
from specformer_jax.planning.cost_table import LEAST_ROUNDS, CostTable, in_turn
from specformer_jax.planning.planner import BudgetPolicy, FixedDrafts, Planner

log = logging.getLogger(__name__)


def make_planner(
    compiled_steps: CompiledSteps,
    path: str | os.PathLike | None,
    acceptance: Sequence[float] | None,
    store: ProgramStore | None = None,
) -> BudgetPolicy:
    """A planner over the engine's own costs; where there is nothing to choose, all drafts that there may be.

    Args:
      path, store: as in `load_or_measure`.
      acceptance: how often the drafts up to each slot are all right, as the head's card says.

    Raises:
      UserError: see `load_or_measure`.
    """
    slots = compiled_steps.model.max_draft_length
    calibration = Calibration(slots, BINS)
    if slots == 0 or len(compiled_steps.budgets) == 1:
        return FixedDrafts(slots, calibration)
    return Planner(load_or_measure(compiled_steps, path, store), calibration, slots, acceptance)


def load_or_measure(
    compiled_steps: CompiledSteps, path: str | os.PathLike | None, store: ProgramStore | None = None
) -> CostTable:
    """The table that was measured on the same before; else a new one, which is kept.

    Args:
      path: the file of the table; None keeps it beside the compiled programs.
      store: where those are kept, if anywhere.

    Raises:
      UserError: the file holds something else, or cannot be written.
    """
    if path is None and store is not None:
        key = store.key(source(compiled_steps), compiled_steps.budgets)
        if kept := store.read(key, lambda content: CostTable.parse(content.decode())):
            return kept
        table = measure(compiled_steps)
        store.write(key, lambda: table.text().encode())
        return table
    if path is not None and Path(path).exists():
        table = CostTable.load(path)
        wanted = {budget.size for budget in compiled_steps.budgets}
        if table.source == source(compiled_steps) and wanted <= table.seconds.keys():
            return table
        log.info("%s was measured on something else: measuring anew", path)
    table = measure(compiled_steps)
    if path is not None:
        table.save(path)
    return table


def measure(compiled_steps: CompiledSteps) -> CostTable:
    """Times every compiled step with two drafts a row, as a drafter runs for few rows in less time; rows never end.

    What seats no more than there are rows is timed without drafts, too, with a row in every place: plain decoding.
    """
    state = compiled_steps.empty()
    near, far = 1, max(2, compiled_steps.shape.positions // 2)
    of_size = {budget.size: budget for budget in compiled_steps.budgets}

    def time_step(step: tuple[int, bool]) -> float:
        nonlocal state
        size, drafts = step
        state, seconds = time_call(compiled_steps, state, of_size[size], near, drafts)
        return seconds

    plain = [(size, False) for size in sorted(of_size) if size <= compiled_steps.shape.rows]
    seconds = in_turn([*plain, *((size, True) for size in sorted(of_size))], time_step)
    # What positions add is seen where all rows have many.
    full = min((b for b in compiled_steps.budgets if b.size >= compiled_steps.shape.rows), key=lambda b: b.size)
    times: dict[int, list[float]] = {near: [], far: []}
    for _ in range(LEAST_ROUNDS):
        for positions, found in times.items():
            state, step = time_call(compiled_steps, state, full, positions, drafts=False)
            found.append(step)
    short, long = (statistics.median(found) for found in times.values())
    per_position = max(0.0, long - short) / ((far - near) * compiled_steps.shape.rows)
    with_drafts, without = ({size: s for (size, drafts), s in seconds.items() if drafts is d} for d in (True, False))
    return CostTable(with_drafts, per_position, source(compiled_steps), without)


def measure_step(compiled_steps: CompiledSteps, rows: int) -> float:
    """Seconds of a plain step of so many rows in the middle of their context, the median of a few."""
    budget = next(b for b in compiled_steps.budgets if b.size == rows and not b.chunk)
    state, found = compiled_steps.empty(), []
    for _ in range(LEAST_ROUNDS):
        state, seconds = time_call(compiled_steps, state, budget, compiled_steps.shape.positions // 2, drafts=False)
        found.append(seconds)
    return statistics.median(found)


def time_call(
    compiled_steps: CompiledSteps, state: DecodeState, budget: StepBudget, positions: int, drafts: bool = True
) -> tuple[DecodeState, float]:
    """One call with rows that have so many positions, and the seconds of each of its steps.

    All rows share the same few pages: what they hold does not change a step, only how many positions are read.
    """
    shape = compiled_steps.shape
    control = compiled_steps.control()
    running = min(shape.rows, max(1, budget.size // 3) if drafts else budget.size)
    state = midway(state, min(positions, shape.positions - compiled_steps.width - 1))
    stop = np.arange(shape.rows) >= running
    pages = np.arange(compiled_steps.tables, dtype=np.int32) % compiled_steps.pages
    control.draft_cap[:] *= drafts
    control = control._replace(stop=stop, pages=np.tile(pages, (shape.rows, 1)))
    state = jax.block_until_ready(state)
    begin = time.perf_counter()
    state, report, _ = compiled_steps.advance(state, control, min(2, compiled_steps.steps), budget)
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
    shape = compiled_steps.shape
    return (
        f"measured on {len(leaves[0].devices())} x {device.device_kind}{layout}, {compiled_steps.model.target.dtype},"
        f" {size} parameters, {drafts}, {shape.rows} rows of {shape.positions} positions,"
        f" {compiled_steps.steps} steps a call"
    )
