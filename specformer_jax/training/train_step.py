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
from jaxtyping import Array, Bool, Float, Int, Key

from pallas_kernels import rms_norm
from specformer_jax import drafters
from specformer_jax.config import TargetConfig
from specformer_jax.drafters.base import Drafter
from specformer_jax.nn.cache import KVCache
from specformer_jax.nn.target import Target, TargetOutput, lm_head
from specformer_jax.training.config import BoundConfig
from specformer_jax.training.loss import Teacher, lm_head_loss
from specformer_jax.training.optimizer import make_optimizer


class TrainState(NamedTuple):
    """What changes from step to step.

    Attributes:
      step: how many steps are done.
      params: the drafter's parameters, float32.
      opt_state: what the optimizer keeps of the steps before.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any


class StepMetrics(NamedTuple):
    """What one step says about itself, as it was before its update.

    Attributes:
      loss: the objective: slot weights included.
      slot_loss: the mean loss of each slot.
      slot_accuracy: how often the largest logit of each slot was its label's.
      kappa: 1 + the mean count of right slots before the first wrong one: what a decode pass that began at a random
        position would commit (see `evaluate` for the count along real passes).
      gradient_norm: the norm of the gradient over all parameters, before it is clipped.
      tokens: how many anchors were trained on.
    """

    loss: Float[Array, ""]
    slot_loss: Float[Array, " J"]
    slot_accuracy: Float[Array, " J"]
    kappa: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    tokens: Float[Array, ""]


class SlotSums(NamedTuple):
    """Sums over the anchors of a micro-batch, from which `StepMetrics` makes means.

    Attributes:
      loss: the sum of each slot's losses.
      correct: how many labels had the largest logit of their slot.
      valid: how many anchors have a label for the slot.
      chain: the sum, over all anchors, of right slots before the first wrong one.
    """

    loss: Float[Array, " J"]
    correct: Float[Array, " J"]
    valid: Float[Array, " J"]
    chain: Float[Array, ""]


class Frozen(NamedTuple):
    """What does not change: inputs of the step, not constants of the program.

    Attributes:
      target: the target's parameters.
      columns: the column that each token has in a pruned draft vocabulary, -1 for tokens outside; None without pruning.
      lm_head: the rows of the LM head that belong to a pruned draft vocabulary; None without pruning.
    """

    target: Any
    columns: Int[Array, " V"] | None = None
    lm_head: Float[Array, "columns D"] | None = None


Batch = dict[str, Array]  # what `batches.Batches` makes; without "hooks" the target runs in the step


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The static part of training: pure functions over `TrainState`.

    Attributes:
      target: the sizes of the frozen target.
      config: the experiment, bound to that target.
    """

    target: TargetConfig
    config: BoundConfig

    @functools.cached_property
    def drafter(self) -> Drafter:
        """The drafter being trained, in the compute dtype."""
        return drafters.make(self.target, self.config.draft, self.config.dtype)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer that the configuration asks for."""
        return make_optimizer(self.config)

    def freeze(self, target_params: Any, token_ids: Int[np.ndarray, " columns"] | None) -> Frozen:
        """The frozen inputs of the step; `token_ids` are those of a pruned draft vocabulary, ascending."""
        if token_ids is None:
            return Frozen(target_params)
        columns = np.full(self.target.vocab_size, -1, np.int32)
        columns[token_ids] = np.arange(len(token_ids))
        return Frozen(target_params, jnp.asarray(columns), lm_head(target_params)[jnp.asarray(token_ids)])

    def init_boxed(self, key: Key[Array, ""]) -> Any:
        """The drafter's first parameters, float32, boxed with their logical axes."""
        width = self.target.width
        hooks = jnp.zeros((1, 2, len(self.config.draft.hook_layers), width))
        return self.drafter.init(key, hooks, jnp.zeros((1, 2, width)))["params"]

    def init(self, key: Key[Array, ""]) -> TrainState:
        """The first state."""
        params = nn.unbox(self.init_boxed(key))
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

    def start_from_target(self, params: Any, target_params: Any) -> Any:
        """`init="target"`: what reads a residual stream begins as the target's last layer."""
        return self.drafter.start_from_target(params, target_params[f"layer_{self.target.layers - 1}"])

    def read_target(self, frozen: Frozen, tokens: Int[Array, "R T"], segments: Int[Array, "R T"]) -> TargetOutput:
        """The frozen target's hooks, keys and values over packed rows."""
        target = Target(self.target, self.config.draft.hook_layers, self.config.dtype)
        return target.apply({"params": frozen.target}, tokens, segments=segments)

    def forecast(
        self, params: Any, frozen: Frozen, batch: Batch
    ) -> tuple[Float[Array, "anchors J D"], Float[Array, "positions D"]]:
        """Runs the drafter over one micro-batch.

        Returns:
          The slots of the anchors of all rows, after the target's final norm or the drafter's own, and the target's own
          last hidden states at the positions of all rows, after its final norm.
        """
        c = self.config
        R, T = batch["tokens"].shape
        hooks, target_kv = self._hooks(frozen, batch)
        following = jnp.pad(batch["tokens"][:, 1:], ((0, 0), (0, 1)))
        embedding = frozen.target["embedding"][following].astype(c.dtype)
        scale, epsilon = frozen.target["final_norm"]["scale"], self.target.rms_epsilon
        start = jnp.zeros(R, jnp.int32)

        def at_anchors(x):  # [R, T, ...] -> [R, A, ...]
            return jnp.take_along_axis(x, jnp.expand_dims(batch["anchors"], tuple(range(2, x.ndim))), axis=1)

        def slots(params):
            context, memory = self.drafter.apply(
                {"params": params}, hooks, embedding, segments=batch["segments"], method="context"
            )
            memory = self.drafter.view(memory, target_kv)

            def forecast(context, token_before, segments):
                longest = c.draft.max_draft_length
                arguments = (context, memory, start, token_before, longest, segments)
                return self.drafter.apply({"params": params}, *arguments, method="forecast")

            def token_before(j, slot):
                return jnp.roll(embedding, -j, axis=1)

            if c.draft.reads_memory:  # slots attend to the slots or the context of other positions: all are needed
                x = at_anchors(forecast(context, token_before, batch["segments"]))
            else:  # slots depend on their anchor alone: only the positions that forecast are worth the work
                x = forecast(at_anchors(context), lambda j, slot: at_anchors(token_before(j, slot)), None)
            return x if self.drafter.norms_slots else rms_norm(x, scale, epsilon=epsilon)

        hidden = (jax.checkpoint(slots) if c.remat else slots)(params)
        last = rms_norm(hooks[:, :, c.draft.hook_layers.index(self.target.layers)], scale, epsilon=epsilon)
        return hidden.reshape(-1, *hidden.shape[2:]), last.reshape(R * T, -1)

    def _hooks(self, frozen: Frozen, batch: Batch) -> tuple[Float[Array, "R T G D"], KVCache]:
        """The stored hooks where the batch has them, without keys and values; else the target runs here."""
        if "hooks" in batch:
            return jax.lax.bitcast_convert_type(batch["hooks"], jnp.bfloat16).astype(self.config.dtype), ()
        out = jax.lax.stop_gradient(self.read_target(frozen, batch["tokens"], batch["segments"]))
        return out.hooks, out.cache

    def losses(
        self, params: Any, frozen: Frozen, batch: Batch, total: Float[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[SlotSums, Bool[Array, "anchors J"]]]:
        """The objective of one micro-batch, as its part of the whole batch's mean over `total` anchors.

        Returns:
          The objective, and beside it the sums for the metrics and which labels had the largest logit.
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
            positions = jnp.minimum(anchors[:, None] + 1 + jnp.arange(J), R * T - 1)
            teacher = Teacher(jax.lax.stop_gradient(last), positions)
        head = lm_head(frozen.target) if frozen.lm_head is None else frozen.lm_head
        out = lm_head_loss(hidden, head, columns, weights, teacher, c.soft)
        chain = jnp.sum(jnp.cumprod(out.correct, axis=1), dtype=jnp.float32)
        sums = SlotSums(out.slot_loss, out.slot_correct, jnp.sum(valid, axis=0, dtype=jnp.float32), chain)
        return out.loss, (sums, out.correct)

    def step(self, state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """One update from one global batch, in `accumulation` micro-batches."""
        total = jnp.maximum(jnp.sum(batch["labels"][..., 0] >= 0, dtype=jnp.float32), 1.0)
        gradient_of = jax.value_and_grad(self.losses, has_aux=True)

        def micro_batch(part: Batch) -> tuple[Array, SlotSums, Any]:
            (loss, (sums, _)), gradient = gradient_of(state.params, frozen, part, total)
            return loss, sums, gradient

        if self.config.accumulation == 1:
            loss, sums, gradient = micro_batch(batch)
        else:
            loss, sums, gradient = _summed(micro_batch, batch, self.config.accumulation)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        seen = jnp.maximum(sums.valid, 1.0)
        metrics = StepMetrics(
            loss=loss,
            slot_loss=sums.loss / seen,
            slot_accuracy=sums.correct / seen,
            kappa=1.0 + sums.chain / total,
            gradient_norm=optax.global_norm(gradient),
            tokens=total,
        )
        return TrainState(state.step + 1, params, opt_state), metrics


def _summed(micro_batch, batch: Batch, count: int):
    """The sum of what `micro_batch` returns over so many parts of a batch, one part at a time."""

    def split(x):  # row r of part m is row r * count + m of the batch: each device keeps its own rows
        return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)

    parts = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], parts)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro_batch, first))

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, micro_batch(part)), None

    return jax.lax.scan(add, zero, parts)[0]
