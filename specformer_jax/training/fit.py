"""The training loop: data, step, metrics and checkpoints put together."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specformer_jax.config import DraftConfig, RopeScaling, TargetConfig
from specformer_jax.errors import UserError
from specformer_jax.loading import head_checkpoint
from specformer_jax.nn.mesh import make_mesh
from specformer_jax.training import run_record, train_step
from specformer_jax.training.checkpoint import Checkpoints
from specformer_jax.training.config import TrainConfig
from specformer_jax.training.data import hook_store
from specformer_jax.training.data.documents import Batches, Document, draft_vocabulary, iterate_batches
from specformer_jax.training.metrics import MetricsWriter

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
      target: sizes of the target.
      target_params: its parameters, in the compute dtype, placed on the mesh.
      documents: the training answers.
      tokenizer: fingerprint, written into what is exported; None if unknown.
    """

    target: TargetConfig
    target_params: Any
    documents: Sequence[Document]
    tokenizer: str | None = None


def bind(config: TrainConfig, target: TargetConfig) -> TrainConfig:
    """The configuration with the head bound to its target."""
    return dataclasses.replace(config, draft=config.draft.bind(target))


def fit(
    config: TrainConfig,
    inputs: Inputs,
    folder: str | Path,
    *,
    offline: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    stop_at: int | None = None,
    progress: bool = True,
) -> train_step.TrainState:
    """Trains a head, going on from the newest checkpoint in `folder` if there is one.

    Args:
      config: the experiment.
      inputs: target and answers.
      folder: of the run: checkpoints/, metrics.jsonl; where matplotlib and tensorboardX are installed, curves.png and
        TensorBoard files.
      offline: store the target's hooks there first and train from them.
      mesh: of `mesh.make_mesh`; None makes the configuration's.
      stop_at: end after this step, the schedule still that of `config.steps`.
      progress: draw a progress bar.

    Returns:
      The last state; it is also the last checkpoint.

    Raises:
      UserError: what does not fit together or to the run in `folder`, a full disk, or a loss that is not finite (with
        its step and batch; the last good checkpoint is kept).
    """
    folder = Path(folder)
    target = inputs.target
    config = bind(config, target)
    config.check(target)
    check_hosts(config, offline)
    if any((folder / "checkpoints").glob("*")):
        run_record.check(folder, config, target)
    mesh = make_mesh(*config.mesh) if mesh is None else mesh
    if mesh.size < jax.device_count():
        log.warning("the mesh %s uses %s of %s devices: --set mesh=...", config.mesh, mesh.size, jax.device_count())
    trainer = train_step.Trainer(target, config)
    token_ids, first_params = None, None
    if Path(config.init).is_dir():
        first_params, token_ids = _exported(config, target)
    if token_ids is None and config.draft.draft_vocab_size is not None:
        token_ids = draft_vocabulary(inputs.documents, config.draft.draft_vocab_size, target)
    frozen = trainer.freeze(inputs.target_params, token_ids)
    store = None
    if offline is not None:
        source = hook_store.source_of(inputs.target_params, config.dtype)
        store = hook_store.HookStore(offline, inputs.documents, config.draft.hook_layers, target.width, source)
        read = train_step.compile_reader(trainer, mesh)
        store.fill(lambda tokens: np.asarray(read(frozen, tokens)))
    packed = Batches(
        inputs.documents,
        slots=config.draft.max_draft_length,
        sequence_length=config.sequence_length,
        rows=config.batch_rows,
        anchors=config.anchors,
        seed=config.seed,
        share=train_step.host_rows(mesh, config.batch_rows),
        hooks=None if store is None else store.__getitem__,
    )
    batches = iterate_batches(packed)
    step = train_step.compile_step(trainer, mesh)
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=config.keep_last, keep_best=config.keep_best)
    state = _begin(trainer, mesh, checkpoints, batches, inputs, first_params, folder)
    if jax.process_index() == 0:
        run_record.write(folder, config, target, token_ids, inputs.tokenizer)

    last = config.steps if stop_at is None else min(stop_at, config.steps)
    done = int(state.step)
    writer = MetricsWriter(folder, done, enabled=jax.process_index() == 0)
    kappa = None
    with _stop_signal() as stopped, contextlib.closing(writer), _bar(progress, done, last) as bar:
        clock, seen = time.perf_counter(), 0.0
        while done < last and not _any_host(stopped[0]):
            batch = next(batches)
            state, metrics = step(state, frozen, train_step.place_batch(batch, mesh, config.batch_rows))
            done += 1
            metrics = jax.device_get(metrics)
            if not math.isfinite(metrics.loss) or not math.isfinite(metrics.gradient_norm):
                checkpoints.wait()
                raise UserError(
                    f"the loss of step {done} is not finite (loss {metrics.loss}, gradient norm"
                    f" {metrics.gradient_norm}; batch {done - 1}): the last good checkpoint is {checkpoints.steps[-1:]}"
                )
            seen += float(metrics.tokens)
            kappa = float(metrics.kappa)
            rate = seen / (time.perf_counter() - clock)
            writer.add(done, metrics, rate)
            bar.update(loss=float(metrics.loss), kappa=kappa, rate=rate)
            if done % config.log_every == 0:
                writer.flush()
            if done % config.checkpoint_every == 0 and done < last:
                writer.flush()
                checkpoints.save(done, state, {"data": batches.get_state()}, {"kappa": kappa})
                clock, seen = time.perf_counter(), 0.0
        if kappa is not None:
            checkpoints.save(done, state, {"data": batches.get_state()}, {"kappa": kappa})
        checkpoints.close()
    return state


def export(run: str | Path, out: str | Path, *, target_name: str | None = None, step: int | None = None) -> int:
    """Writes a run's head as one safetensors file and its config; returns the step.

    Raises:
      UserError: no such run or checkpoint.
    """
    from specformer_jax.training import checkpoint

    run = Path(run)
    stored = run_record.read(run)
    sizes = stored["target"]
    scaling = None if sizes["rope_scaling"] is None else RopeScaling(**sizes["rope_scaling"])
    target = TargetConfig(**(sizes | {"eos_ids": tuple(sizes["eos_ids"]), "rope_scaling": scaling}))
    draft = dict(stored["config"]["draft"])
    draft["hook_layers"] = tuple(draft["hook_layers"])
    token_ids = stored["token_ids"]
    step, params = checkpoint.load_params(run / "checkpoints", step)
    head_checkpoint.save_head(
        out,
        DraftConfig(**draft),
        target,
        params,
        None if token_ids is None else np.asarray(token_ids, np.int32),
        target_name=target_name or stored["config"]["target"],
        tokenizer=stored["tokenizer"],
    )
    return step


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


def _exported(config: TrainConfig, target: TargetConfig) -> tuple[Any, np.ndarray | None]:
    """Parameters of the exported head to go on from, and its draft vocabulary if that is to stay."""
    stored, params, token_ids = head_checkpoint.load_head(config.init, target)
    # No parameter belongs to the draft vocabulary, so another size may be asked for and is built from the data. A
    # sequential FFN starts as the identity, so it can be added to a head that was trained without one; and narrowed.
    draft = config.draft
    width, before = draft.sequential_ffn or 0, stored.sequential_ffn or 0
    same = dataclasses.replace(stored, draft_vocab_size=draft.draft_vocab_size, sequential_ffn=draft.sequential_ffn)
    if same != draft or (before and not 0 < width <= before):
        raise UserError(f"the head in {config.init} is another one than the configuration's: {stored}")
    if width < before:
        params = _narrowed(params, width)
    return params, token_ids if stored.draft_vocab_size == draft.draft_vocab_size else None


def _narrowed(params: dict[str, Any], width: int) -> dict[str, Any]:
    """The head with the inner units of its sequential FFN that weigh most: by norm of gate times up times down."""
    sequential, ffn = params["sequential"], params["sequential"]["ffn"]
    inward = np.concatenate([sequential["slot_gate_up"], ffn["gate_up"]]).astype(np.float32)  # [3D, 2, F]
    outward = np.linalg.norm(ffn["down"].astype(np.float32), axis=1)
    kept = np.sort(np.argsort(-np.linalg.norm(inward, axis=0).prod(axis=0) * outward)[:width])
    narrow = {"gate_up": ffn["gate_up"][:, :, kept], "down": ffn["down"][kept]}
    return params | {"sequential": sequential | {"slot_gate_up": sequential["slot_gate_up"][:, :, kept], "ffn": narrow}}


def _begin(trainer, mesh, checkpoints, batches, inputs: Inputs, first_params, folder: Path) -> train_step.TrainState:
    """The newest checkpoint, or the first state."""
    shardings = trainer.state_shardings(mesh)
    shapes = jax.eval_shape(trainer.init, jax.random.key(0))
    abstract = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings)
    found = checkpoints.restore(abstract)
    if found is not None:
        step, state, extra = found
        batches.set_state(extra["data"])
        print(f"going on from checkpoint {step} in {folder}")
        return state
    state = train_step.init_state(trainer, mesh, trainer.config.seed)
    if first_params is not None:
        places = {name: shardings.params[name] for name in first_params}
        placed = jax.tree.map(lambda x, place: jax.device_put(x.astype(np.float32), place), first_params, places)
        return state._replace(params=state.params | placed)
    if trainer.config.init == "target":
        place = jax.jit(trainer.start_from_target, out_shardings=shardings.params)
        state = state._replace(params=place(state.params, inputs.target_params))
    return state


@contextlib.contextmanager
def _stop_signal() -> Iterator[list[bool]]:
    """[True] once SIGTERM came: the loop then saves and returns."""
    stopped = [False]

    def stop(number, frame):
        stopped[0] = True

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: somebody else handles signals
        yield stopped
        return
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)


def _any_host(stopped: bool) -> bool:
    """Whether any host was asked to stop, so that all stop after the same step."""
    if jax.process_count() == 1:
        return stopped
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(stopped)).any())


@contextlib.contextmanager
def _bar(enabled: bool, done: int, last: int):
    from tqdm import tqdm

    class Bar:
        def __init__(self, bar):
            self._bar = bar

        def update(self, loss: float, kappa: float, rate: float) -> None:
            self._bar.set_postfix_str(f"loss {loss:.3f} kappa {kappa:.3f} {rate:.0f} tokens/s")
            self._bar.update()

    with tqdm(initial=done, total=last, unit="step", disable=not enabled or jax.process_index() > 0) as bar:
        yield Bar(bar)
