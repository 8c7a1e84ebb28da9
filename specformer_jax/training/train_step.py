"""One training step as a pure function: TrainState, batch -> TrainState, metrics. The target runs frozen inside it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from specformer_jax import drafters
from specformer_jax.config import TargetConfig
from specformer_jax.drafters.base import Drafter
from specformer_jax.nn.layers import rms_norm
from specformer_jax.nn.mesh import ROWS, param_shardings
from specformer_jax.nn.target import Target, lm_head
from specformer_jax.training.config import TrainConfig
from specformer_jax.training.loss import Teacher, lm_head_loss
from specformer_jax.training.optimizer import make_optimizer

Array = jax.Array


class TrainState(NamedTuple):
    """What changes from step to step.

    Attributes:
      step: i32[], steps done.
      params: the head's parameters, f32.
      opt_state: of the optimizer.
    """

    step: Array
    params: Any
    opt_state: Any


class StepMetrics(NamedTuple):
    """Of one step, before its update.

    Attributes:
      loss: f32[], the objective: slot weights included.
      slot_loss: f32[J], mean loss of each slot.
      slot_accuracy: f32[J], how often each slot's largest logit was the label.
      kappa: f32[], 1 + the mean count of right slots before the first wrong one: what a decode pass that began at a
        random position would commit (see `evaluate` for the count along real passes).
      gradient_norm: f32[].
      tokens: f32[], anchors trained on.
    """

    loss: Array
    slot_loss: Array
    slot_accuracy: Array
    kappa: Array
    gradient_norm: Array
    tokens: Array


class Frozen(NamedTuple):
    """What does not change: inputs of the step, not constants of the program.

    Attributes:
      target: the target's parameters.
      columns: i32[V], the draft vocabulary's column of each token, -1 outside; None without pruning.
      lm_head: f[V', D], the draft's rows of the LM head; None without pruning.
    """

    target: Any
    columns: Array | None = None
    lm_head: Array | None = None


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The static part of training: pure functions over `TrainState`.

    Attributes:
      target: sizes of the frozen target.
      config: the experiment; `config.draft` must be bound to the target.
    """

    target: TargetConfig
    config: TrainConfig

    @functools.cached_property
    def drafter(self) -> Drafter:
        """The drafter being trained, in the compute dtype."""
        return drafters.make(self.target, self.config.draft, self.config.dtype)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Of the configuration."""
        return make_optimizer(self.config)

    def freeze(self, target_params: Any, token_ids: np.ndarray | None) -> Frozen:
        """The frozen inputs of the step; token_ids i32[V'] for a pruned draft vocabulary."""
        if token_ids is None:
            return Frozen(target_params)
        columns = np.full(self.target.vocab_size, -1, np.int32)
        columns[token_ids] = np.arange(len(token_ids))
        return Frozen(target_params, jnp.asarray(columns), lm_head(target_params)[jnp.asarray(token_ids)])

    def init_boxed(self, key: Array) -> Any:
        """The head's parameters f32 with their logical axes."""
        width = self.target.width
        hooks = jnp.zeros((1, 2, len(self.config.draft.hook_layers), width))
        return self.drafter.init(key, hooks, jnp.zeros((1, 2, width)))["params"]

    def init(self, key: Array) -> TrainState:
        """The first state."""
        params = nn.unbox(self.init_boxed(key))
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

    def state_shardings(self, mesh: Mesh) -> Any:
        """A `TrainState` with a `NamedSharding` for each array; the optimizer's follow the parameters'."""
        boxed = jax.eval_shape(self.init_boxed, jax.random.key(0))
        params = param_shardings(boxed, mesh)
        whole: Any = NamedSharding(mesh, P())
        # An optimizer's moments are trees of the parameters' own names, whatever they are wrapped in.
        places = {tuple(map(str, path)): place for path, place in jax.tree.leaves_with_path(params)}

        def place(path, leaf):
            names = tuple(map(str, path))
            found = (places[names[i:]] for i in range(len(names)) if names[i:] in places)
            return next(found, whole) if leaf.ndim else whole

        opt_state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(self.optimizer.init, nn.unbox(boxed)))
        return TrainState(whole, params, opt_state)

    def start_from_target(self, params: Any, target_params: Any) -> Any:
        """`init="target"`: what reads a residual stream begins as the target's last layer."""
        return self.drafter.start_from_target(params, target_params[f"layer_{self.target.layers - 1}"])

    def read_target(self, frozen: Frozen, tokens: Array, segments: Array) -> Array:
        """The frozen target's hooks over packed rows: i32[R, T] -> f[R, T, G, D]."""
        target = Target(self.target, self.config.draft.hook_layers, self.config.dtype)
        start = jnp.zeros(tokens.shape[0], jnp.int32)
        return target.apply({"params": frozen.target}, tokens, start, None, segments).hooks

    def forecast(self, params: Any, frozen: Frozen, batch: dict[str, Array]) -> tuple[Array, Array]:
        """The head over one micro-batch.

        Args:
          batch: of `documents.Batches`; without "hooks" the target runs here.

        Returns:
          hidden f[R * A, J, D], the slots after the target's final norm, and the target's own last hidden states
          f[R * T, D] after it.
        """
        R, T = batch["tokens"].shape
        c = self.config
        if "hooks" in batch:
            hooks = jax.lax.bitcast_convert_type(batch["hooks"], jnp.bfloat16).astype(c.dtype)
        else:
            hooks = jax.lax.stop_gradient(self.read_target(frozen, batch["tokens"], batch["segments"]))
        following = jnp.pad(batch["tokens"][:, 1:], ((0, 0), (0, 1)))
        embedding = frozen.target["embedding"][following].astype(c.dtype)
        scale, epsilon = frozen.target["final_norm"]["scale"], self.target.rms_epsilon
        start = jnp.zeros(R, jnp.int32)

        def at_anchors(x):
            return jnp.take_along_axis(x, batch["anchors"].reshape(R, -1, *[1] * (x.ndim - 2)), axis=1)

        def slots(params):
            context, memory = self.drafter.apply(
                {"params": params}, hooks, embedding, start, None, batch["segments"], method="context"
            )
            # Slots that depend on their anchor alone: only the positions that forecast are worth the work.
            early, late = (lambda x: x, at_anchors) if c.draft.reads_memory else (at_anchors, lambda x: x)
            x = self.drafter.apply(
                {"params": params},
                early(context),
                memory,
                start,
                lambda j, slot: early(jnp.roll(embedding, -j, axis=1)),
                c.draft.max_draft_length,
                batch["segments"] if c.draft.reads_memory else None,
                method="forecast",
            )
            return rms_norm(late(x), scale, epsilon)

        hidden = (jax.checkpoint(slots) if c.remat else slots)(params)
        last = rms_norm(hooks[:, :, c.draft.hook_layers.index(self.target.layers)], scale, epsilon)
        return hidden.reshape(-1, *hidden.shape[2:]), last.reshape(R * T, -1)

    def losses(self, params: Any, frozen: Frozen, batch: dict[str, Array], total: Array):
        """The objective of one micro-batch, as its part of the whole batch's mean over `total` anchors.

        Returns:
          f32[] and (slot losses f32[J], slot right f32[J], valid f32[J], chain sum f32[], correct bool[R * A, J]).
        """
        c = self.config
        J = c.draft.max_draft_length
        hidden, last = self.forecast(params, frozen, batch)
        labels = batch["labels"].reshape(-1, J)
        valid = labels >= 0
        columns = labels if frozen.columns is None else frozen.columns[jnp.maximum(labels, 0)]
        columns = jnp.where(valid, columns, -1)
        weights = c.slot_decay ** jnp.arange(J)
        weights = valid * (weights / weights.mean()) / (total * J)
        teacher = None
        if c.soft:
            R, T = batch["tokens"].shape
            anchors = (batch["anchors"] + T * jnp.arange(R)[:, None]).reshape(-1)
            # Slot j forecasts token t + 2 + j, whose distribution the target gives at t + 1 + j.
            rows = jnp.minimum(anchors[:, None] + 1 + jnp.arange(J), R * T - 1)
            teacher = Teacher(jax.lax.stop_gradient(last), rows)
        head = lm_head(frozen.target) if frozen.lm_head is None else frozen.lm_head
        out = lm_head_loss(hidden, head, columns, weights, teacher, c.soft)
        chain = jnp.sum(jnp.cumprod(out.correct, axis=1))
        return out.loss, (
            out.slot_loss,
            out.slot_correct,
            jnp.sum(valid, axis=0, dtype=jnp.float32),
            chain,
            out.correct,
        )

    def step(self, state: TrainState, frozen: Frozen, batch: dict[str, Array]) -> tuple[TrainState, StepMetrics]:
        """One update from one global batch, in `accumulation` micro-batches."""
        M = self.config.accumulation
        total = jnp.maximum(jnp.sum(batch["labels"][..., 0] >= 0, dtype=jnp.float32), 1.0)
        gradient = jax.value_and_grad(self.losses, has_aux=True)

        def micro(part):
            (loss, (*sums, _)), g = gradient(state.params, frozen, part, total)
            return loss, tuple(sums), g

        if M == 1:
            loss, sums, g = micro(batch)
        else:
            # Row r of micro-batch m is row r * M + m: each device keeps its own rows.
            parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, M, *x.shape[1:]), 0, 1), batch)
            shapes = jax.eval_shape(micro, jax.tree.map(lambda x: x[0], parts))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            add = lambda carry, part: (jax.tree.map(jnp.add, carry, micro(part)), None)
            (loss, sums, g), _ = jax.lax.scan(add, zero, parts)

        slot_loss, slot_correct, valid, chain = sums
        updates, opt_state = self.optimizer.update(g, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        seen = jnp.maximum(valid, 1.0)
        metrics = StepMetrics(
            loss, slot_loss / seen, slot_correct / seen, 1.0 + chain / total, optax.global_norm(g), total
        )
        return TrainState(state.step + 1, params, opt_state), metrics


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the axes that split data."""
    return NamedSharding(mesh, P(ROWS))


def compile_step(trainer: Trainer, mesh: Mesh):
    """`trainer.step` under jit on a mesh: the state donated, its shardings fixed, the batch split over rows."""
    shardings = trainer.state_shardings(mesh)

    def step(state, frozen, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the kernels run on each device's share of it
            return trainer.step(state, frozen, batch)

    return jax.jit(
        step,
        in_shardings=(shardings, None, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def compile_reader(trainer: Trainer, mesh: Mesh):
    """(frozen, tokens i32[R, T]) -> u16[R, T, G, D], the bfloat16 bits of whole rows' hooks; under jit on a mesh."""

    def read(frozen, tokens):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            hooks = trainer.read_target(frozen, tokens, jnp.ones_like(tokens)).astype(jnp.bfloat16)
        return jax.lax.bitcast_convert_type(hooks, jnp.uint16)

    return jax.jit(read)


def init_state(trainer: Trainer, mesh: Mesh, seed: int) -> TrainState:
    """The first state, born in its shardings."""
    return jax.jit(trainer.init, out_shardings=trainer.state_shardings(mesh))(jax.random.key(seed))


def host_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which rows of a global batch this host's devices hold, ascending; the same where `model` spans hosts."""
    held = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in held if index is not None for row in range(rows)[index[0]]})


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, rows: int) -> dict[str, Array]:
    """This host's `host_rows` of a batch of so many rows -> global arrays."""
    place, local = batch_sharding(mesh), {row: i for i, row in enumerate(host_rows(mesh, rows))}

    def put(x: np.ndarray) -> Array:
        def share(index):
            return x[[local[row] for row in range(rows)[index[0]]]]

        return jax.make_array_from_callback((rows, *x.shape[1:]), place, share)

    return {name: put(x) for name, x in batch.items()}
