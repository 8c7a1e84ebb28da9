"""The training loop: data, step, metrics and checkpoints put together."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specformer_jax.config import TargetConfig
from specformer_jax.decoding.program_store import ProgramStore
from specformer_jax.errors import UserError, require
from specformer_jax.loading.packing import unpack_tree
from specformer_jax.nn.mesh import make_mesh
from specformer_jax.planning.chips import chip_of
from specformer_jax.training import export, placement
from specformer_jax.training.config import BoundConfig, TrainConfig
from specformer_jax.training.data import hook_store
from specformer_jax.training.data.batches import Batches, iterate_batches
from specformer_jax.training.data.documents import Document
from specformer_jax.training.held_out import HeldOut, HeldOutCounter
from specformer_jax.training.metrics import MetricsWriter
from specformer_jax.training.optimizer import make_schedule
from specformer_jax.training.report import data_report
from specformer_jax.training.report.boards import boards
from specformer_jax.training.report.progress import Progress
from specformer_jax.training.report.step_times import STEP_PARTS, StepTimes
from specformer_jax.training.run import finite, owner, run_record, stop_signals
from specformer_jax.training.run.checkpoint import Checkpoints
from specformer_jax.training.run.start import Start
from specformer_jax.training.run.stop_signals import StopSignals
from specformer_jax.training.train_step import StepMetrics, Trainer, TrainState

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
      target: the sizes of the target.
      target_params: the target's parameters, in the compute dtype, placed on the mesh; weights that `load` has
        packed for a CPU are unpacked.
      documents: the answers to train on.
      tokenizer: the fingerprint of the target's tokenizer, written into what is exported; None if unknown.
    """

    target: TargetConfig
    target_params: Any
    documents: Sequence[Document]
    tokenizer: str | None = None


def fit(
    config: BoundConfig,
    inputs: Inputs,
    folder: str | Path,
    *,
    offline: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    stop_at: int | None = None,
    start: Start = Start(),
    stop: StopSignals | None = None,
    held_out: HeldOut | None = None,
    programs: str | Path | None = None,
    progress: bool = True,
    wandb: str | None = None,
) -> TrainState:
    """Trains a head, going on from the newest checkpoint in `folder` if there is one.

    Metrics stay on the device until `config.log_every` steps are done, or a checkpoint or a count of held-out answers
    is due: only then are they fetched, written, and found to be finite or not. A loss that is not finite is therefore
    noticed up to `log_every` steps late, but its own step is named, and no checkpoint is ever written after it.

    Args:
      config: the experiment, bound to the target (`TrainConfig.bind`).
      inputs: the target and the answers.
      folder: the run's folder, for checkpoints/, metrics.jsonl and data_report.json, and for TensorBoard files where
        tensorboardX is installed. `report.run_report` makes a page of them. One process holds it at a time.
      offline: a folder to store the target's hooks in first, and to train from; None runs the target in every step.
      mesh: the mesh to train on (`mesh.make_mesh`); None makes the configuration's.
      stop_at: the step to end after, with the schedule still that of `config.steps`; None trains all steps.
      start: whether the run is new, goes on, or either.
      stop: the signals that end the run after a step; None listens for them here.
      held_out: what the head is judged by every so often, and which checkpoints are best; None judges them by the
        batches that were trained on.
      programs: a folder that keeps compiled programs between starts, of one process; None compiles them each time.
      progress: whether to draw a progress bar, or to print lines where there is no terminal.
      wandb: the project at Weights & Biases that the run is logged to, or None.

    Returns:
      The last state; it is also the last checkpoint.

    Raises:
      UserError: what does not fit together or to the run in `folder`, a folder that another process holds, a full disk,
        or a loss that is not finite (with its step and batch; the last good checkpoint is kept).
    """
    folder = Path(folder)
    require((stop_at is None or stop_at >= 1, f"stop_at {stop_at} must be at least 1"))
    check_fits(config, offline is not None)
    with contextlib.ExitStack() as held:
        if stop is None:
            stop = held.enter_context(stop_signals.listening())
        if jax.process_index() == 0:
            held.enter_context(owner.owned(folder))
        return _fit(config, inputs, folder, offline, mesh, stop_at, start, stop, held_out, programs, progress, wandb)


def _fit(
    config: BoundConfig,
    inputs: Inputs,
    folder: Path,
    offline: str | Path | None,
    mesh: jax.sharding.Mesh | None,
    stop_at: int | None,
    start: Start,
    stop: StopSignals,
    held_out: HeldOut | None,
    programs: str | Path | None,
    progress: bool,
    wandb: str | None,
) -> TrainState:
    """`fit` once its folder is held and its signals are listened for."""
    # --- what is trained, and where ---
    target, main_host = inputs.target, jax.process_index() == 0
    target_params = unpack_tree(inputs.target_params)
    stored = start.stored_run(folder)
    mesh = make_mesh(*config.mesh) if mesh is None else mesh
    if mesh.size < jax.device_count():
        log.warning("the mesh %s uses %s of %s devices: --set mesh=...", config.mesh, mesh.size, jax.device_count())
    trainer = Trainer(target, config)
    first_params, token_ids = export.start_of(config, target, inputs.documents)
    if stored is not None and stored["token_ids"] is not None:
        # Also where the data has changed: these are what the state has learned.
        token_ids = np.asarray(stored["token_ids"], np.int32)
    described = run_record.describe(config, target, inputs.documents, token_ids, inputs.tokenizer, offline is not None)
    if stored is not None:
        for change in run_record.check(folder, stored, described, start.allow_change):
            print(f"changed since the run began: {change}")
    frozen = trainer.freeze(target_params, token_ids)

    # --- data ---
    store = None
    if offline is not None:
        source = hook_store.source_of(target_params, config.dtype)
        store = hook_store.HookStore(offline, inputs.documents, config.draft.hook_layers, target.width, source)
        read = placement.compile_reader(trainer, mesh)
        store.fill(lambda tokens: np.asarray(read(frozen, tokens)))
    packed = pack(config, inputs.documents, mesh, store)
    batches = iterate_batches(packed)

    # --- state: the newest checkpoint, or the first one ---
    judged_by = None if held_out is None else held_out.digest
    checkpoints = Checkpoints(
        folder / "checkpoints", keep_last=config.keep_last, keep_best=config.keep_best, judged_by=judged_by
    )
    found = checkpoints.restore(placement.abstract_state(trainer, mesh))
    if found is None:
        state = placement.first_state(trainer, mesh, first_params, target_params)
    else:
        number, state, extra = found
        batches.set_state(extra["data"])
        print(f"going on from checkpoint {number} in {folder}")
    done = int(state.step)
    last = config.steps if stop_at is None else min(stop_at, config.steps)
    if done >= last:
        checkpoints.close()
        return state
    if main_host:
        run_record.write(folder, described)
        if found is None:  # what goes on has its report
            stored_hooks = store is not None
            about = data_report.describe(
                trainer, inputs.documents, packed, token_ids, mesh.size, stored_hooks=stored_hooks
            )
            about.write(folder)
            print(*about.lines(), sep="\n", flush=True)
        if held_out is not None and (both := held_out.trained_on(inputs.documents)):
            log.warning("%s of the %s held-out prompts are trained on, too", both, len(held_out.documents))

    # --- steps ---
    keep = None if programs is None else ProgramStore(programs)
    step, read = placement.compile_step(trainer, mesh), placement.compile_reader(trainer, mesh)
    if keep is not None:
        step, read = keep.keeping(step, "training step", trainer), keep.keeping(read, "hooks", trainer)
    counter = None if held_out is None else HeldOutCounter(trainer, mesh, frozen, token_ids, held_out, keep)
    blame = lambda number: finite.blame(trainer, mesh, frozen, packed[number]["tokens"])
    shown = Progress(done, last, enabled=progress and main_host)
    times = StepTimes(shown.seconds)
    schedule = jax.jit(make_schedule(config, config.learning_rate))  # one program, not one for each of its operations
    least_seconds = _least_seconds(folder, mesh)
    unread: list[StepMetrics] = []  # metrics of the steps since the last line, still on the device
    with contextlib.ExitStack() as open_until_end:
        drawn = boards(folder, wandb, described["config"]) if main_host else []
        writer = open_until_end.enter_context(contextlib.closing(MetricsWriter(folder, done, main_host, drawn)))
        open_until_end.enter_context(contextlib.closing(shown))
        open_until_end.enter_context(stop.after_a_step())
        while done < last:
            with times.of("data"):
                batch = placement.place_batch(next(batches), mesh, config.batch_rows)
            state, metrics = step(state, frozen, batch)
            done += 1
            unread.append(metrics)
            # One step runs while the host makes the next batch; more would hold all their batches on the device.
            jax.block_until_ready(unread[-2:-1])
            shown.step(done, metrics)

            stopping = stop.asked(done) or done == last
            saving = stopping or done % config.checkpoint_every == 0
            judging = counter is not None and (saving or counter.due(done))
            if saving or judging or done % config.log_every == 0:
                steps, unread = jax.device_get(unread), []
                finite.check(steps, done, checkpoints, blame)
                if "hooks" not in batch:  # with stored hooks the target takes no time
                    tokens = batch["tokens"][: config.micro_rows]
                    times.time_target(functools.partial(read, frozen, tokens), passes=config.accumulation)
                more: dict[str, Any] = {"seconds": times.take(len(steps))}
                seconds = max(sum(more["seconds"][part] for part in STEP_PARTS), 1e-9)
                rate = float(sum(metrics.tokens for metrics in steps)) / seconds
                if least_seconds is not None:
                    more["mfu"] = round(least_seconds * len(steps) / seconds, 4)
                kappa = float(steps[-1].kappa)
                if counter is not None and judging:
                    with times.of("held out"):
                        counts = counter.count(state.params)
                    kappa, more["held_out"] = counts.passes.kappa, counts.report()
                    shown.say(counts.line())
                writer.add(done, steps, rate, float(schedule(done - 1)), more)
                shown.show(done, steps[-1], rate, float(schedule(done - 1)))
                if saving:
                    with times.of("checkpoint"):
                        checkpoints.save(done, state, {"data": batches.get_state()}, kappa)
            if stopping:
                break
        checkpoints.close()
    return state


def _least_seconds(folder: Path, mesh: jax.sharding.Mesh) -> float | None:
    """What a step would take at the chips' peak, None where that is not known."""
    described, chip = data_report.read(folder), chip_of(jax.devices()[0].device_kind)
    if described is None or chip is None:
        return None
    return described["step_flops"] / (chip.peak * mesh.size)


def pack(
    config: BoundConfig,
    documents: Sequence[Document],
    mesh: jax.sharding.Mesh,
    store: hook_store.HookStore | None = None,
) -> Batches:
    """The documents as this host's rows of packed batches, with their hooks where these are stored.

    Raises:
      UserError: no document can be trained on.
    """
    return Batches(
        documents,
        slots=config.draft.max_draft_length,
        sequence_length=config.sequence_length,
        rows=config.batch_rows,
        anchors=config.anchors,
        seed=config.seed,
        share=placement.host_rows(mesh, config.batch_rows),
        hooks=None if store is None else store.__getitem__,
    )


def check_fits(config: TrainConfig, offline: bool) -> None:
    """Refuses a mesh that the devices do not fit, hooks that are not enough, and what leaves a host waiting for ever.

    Raises:
      UserError: more devices than there are; stored hooks for a drafter that reads what they lack; on several hosts a
        mesh that does not name every device, or stored hooks.
    """
    if offline and config.draft.reads_target_kv:
        raise UserError(
            f"--offline stores hooks, no keys and values, which draft.reuse={config.draft.reuse} reads: leave it out"
        )
    devices, named = jax.device_count(), math.prod(config.mesh)
    if named > devices or (jax.process_count() > 1 and named != devices):
        raise UserError(f"the mesh {config.mesh} needs {named} devices, there are {devices}: --set mesh=...")
    if jax.process_count() > 1 and offline:
        raise UserError("--offline stores hooks for one process: leave it out on several hosts")
