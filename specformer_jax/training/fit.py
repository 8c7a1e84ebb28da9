"""The training loop: data, step, metrics and checkpoints put together."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specformer_jax.config import TargetConfig
from specformer_jax.errors import UserError, require
from specformer_jax.loading.packing import unpack_tree
from specformer_jax.nn.mesh import make_mesh
from specformer_jax.training import export, placement
from specformer_jax.training.config import BoundConfig, TrainConfig
from specformer_jax.training.data import hook_store
from specformer_jax.training.data.batches import Batches, iterate_batches
from specformer_jax.training.data.documents import Document, draft_vocabulary
from specformer_jax.training.metrics import MetricsWriter
from specformer_jax.training.optimizer import make_schedule
from specformer_jax.training.report import data_report
from specformer_jax.training.report.progress import Progress
from specformer_jax.training.run import content, owner, run_record, stop_signals
from specformer_jax.training.run.checkpoint import Checkpoints
from specformer_jax.training.run.start import Start
from specformer_jax.training.run.stop_signals import StopSignals
from specformer_jax.training.train_step import Frozen, StepMetrics, Trainer, TrainState

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
    progress: bool = True,
) -> TrainState:
    """Trains a head, going on from the newest checkpoint in `folder` if there is one.

    Metrics stay on the device until `config.log_every` steps are done, or a checkpoint is due: only then are they
    fetched, written, and found to be finite or not. A loss that is not finite is therefore noticed up to `log_every`
    steps late, but its own step is named, and no checkpoint is ever written after it.

    Args:
      config: the experiment, bound to the target (`TrainConfig.bind`).
      inputs: the target and the answers.
      folder: the run's folder, for checkpoints/, metrics.jsonl and data_report.json, and for curves.png and TensorBoard
        files where matplotlib and tensorboardX are installed. One process holds it at a time.
      offline: a folder to store the target's hooks in first, and to train from; None runs the target in every step.
      mesh: the mesh to train on (`mesh.make_mesh`); None makes the configuration's.
      stop_at: the step to end after, with the schedule still that of `config.steps`; None trains all steps.
      start: whether the run is new, goes on, or either.
      stop: the signals that end the run after a step; None listens for them here.
      progress: whether to draw a progress bar, or to print lines where there is no terminal.

    Returns:
      The last state; it is also the last checkpoint.

    Raises:
      UserError: what does not fit together or to the run in `folder`, a folder that another process holds, a full disk,
        or a loss that is not finite (with its step and batch; the last good checkpoint is kept).
    """
    folder = Path(folder)
    require((stop_at is None or stop_at >= 1, f"stop_at {stop_at} must be at least 1"))
    check_hosts(config, offline)
    with contextlib.ExitStack() as held:
        if stop is None:
            stop = held.enter_context(stop_signals.listening())
        if jax.process_index() == 0:
            held.enter_context(owner.owned(folder))
        return _fit(config, inputs, folder, offline, mesh, stop_at, start, stop, progress)


def _fit(
    config: BoundConfig,
    inputs: Inputs,
    folder: Path,
    offline: str | Path | None,
    mesh: jax.sharding.Mesh | None,
    stop_at: int | None,
    start: Start,
    stop: StopSignals,
    progress: bool,
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
    first_params, token_ids = start_of(config, target, inputs.documents)
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
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=config.keep_last, keep_best=config.keep_best)
    found = checkpoints.restore(placement.abstract_state(trainer, mesh))
    if found is None:
        state = _first_state(trainer, mesh, first_params, target_params)
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

    # --- steps ---
    step = placement.compile_step(trainer, mesh)
    blame = lambda number: _blame(trainer, mesh, frozen, packed[number]["tokens"])
    writer = MetricsWriter(folder, done, enabled=main_host)
    shown = Progress(done, last, enabled=progress and main_host)
    schedule = make_schedule(config, config.learning_rate)
    unread: list[StepMetrics] = []  # metrics of the steps since the last line, still on the device
    with contextlib.closing(writer), contextlib.closing(shown), stop.after_a_step():
        clock, tokens = shown.seconds(), 0.0
        while done < last:
            batch = placement.place_batch(next(batches), mesh, config.batch_rows)
            state, metrics = step(state, frozen, batch)
            done += 1
            unread.append(metrics)
            # One step runs while the host makes the next batch; more would hold all their batches on the device.
            jax.block_until_ready(unread[-2:-1])
            shown.step(done, metrics)

            stopping = stop.asked(done) or done == last
            saving = stopping or done % config.checkpoint_every == 0
            if saving or done % config.log_every == 0:
                steps, unread = jax.device_get(unread), []
                _check_finite(steps, done, checkpoints, blame)
                tokens += float(sum(metrics.tokens for metrics in steps))
                rate, learning_rate = tokens / (shown.seconds() - clock), float(schedule(done - 1))
                writer.add(done, steps, rate, learning_rate)
                newest = steps[-1]
                shown.show(done, newest, rate, learning_rate)
                if saving:
                    checkpoints.save(done, state, {"data": batches.get_state()}, float(newest.kappa))
                    clock, tokens = shown.seconds(), 0.0
            if stopping:
                break
        checkpoints.close()
    return state


def start_of(config: BoundConfig, target: TargetConfig, documents: Sequence[Document]) -> tuple[Any, np.ndarray | None]:
    """The parameters of a head to go on from, or None, and the token ids of a pruned draft vocabulary, or None.

    Raises:
      UserError: the head that `TrainConfig.init` names is none to go on from.
    """
    first_params, token_ids = None, None
    if Path(config.init).is_dir():
        first_params, token_ids = export.read_start(config, target)
    if token_ids is None and config.draft.draft_vocab_size is not None:
        token_ids = draft_vocabulary(documents, config.draft.draft_vocab_size, target)
    return first_params, token_ids


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


def check_hosts(config: TrainConfig, offline: str | Path | None) -> None:
    """Refuses a mesh that the devices do not fit, and on several hosts what would leave one waiting for ever.

    Raises:
      UserError: more devices than there are; on several hosts a mesh that does not name every device, or stored hooks.
    """
    devices, named = jax.device_count(), math.prod(config.mesh)
    if named > devices or (jax.process_count() > 1 and named != devices):
        raise UserError(f"the mesh {config.mesh} needs {named} devices, there are {devices}: --set mesh=...")
    if jax.process_count() > 1 and offline is not None:
        raise UserError("--offline stores hooks for one process: leave it out on several hosts")


def _first_state(trainer: Trainer, mesh: jax.sharding.Mesh, first_params: Any, target_params: Any) -> TrainState:
    """The state before the first step, as `TrainConfig.init` says; `first_params` are those of a head to go on from."""
    state = placement.init_state(trainer, mesh, trainer.config.seed)
    shardings = placement.state_shardings(trainer, mesh).params
    if first_params is not None:
        places = {name: shardings[name] for name in first_params}
        placed = jax.tree.map(lambda x, place: jax.device_put(x.astype(np.float32), place), first_params, places)
        return state._replace(params=state.params | placed)
    if trainer.config.init == "target":
        start = jax.jit(trainer.start_from_target, out_shardings=shardings)
        return state._replace(params=start(state.params, target_params))
    return state


def _check_finite(
    steps: Sequence[StepMetrics], done: int, checkpoints: Checkpoints, blame: Callable[[int], str]
) -> None:
    """Raises UserError with the first of the last steps whose loss or gradient is not finite."""
    for step, metrics in enumerate(steps, done - len(steps) + 1):
        if not math.isfinite(metrics.loss) or not math.isfinite(metrics.gradient_norm):
            checkpoints.wait()
            raise UserError(
                f"the loss of step {step} is not finite (loss {metrics.loss}, gradient norm"
                f" {metrics.gradient_norm}; batch {step - 1}): the last good checkpoint is {checkpoints.steps[-1:]};"
                f" {blame(step - 1)}"
            )


def _blame(trainer: Trainer, mesh: jax.sharding.Mesh, frozen: Frozen, tokens: np.ndarray) -> str:
    """What makes a loss not finite, as far as the target's part of it tells."""
    _, broken = content.examine(frozen.target)
    if broken:
        return f"the target's {broken[0]} is not finite"
    if jax.process_count() == 1:  # the hooks of several hosts are in no one place
        hooks = np.asarray(placement.compile_reader(trainer, mesh)(frozen, tokens))
        if not hook_store.all_finite(hooks):
            return f"the target's hidden states are not finite in {trainer.config.dtype}"
    return "a lower learning rate may help"
