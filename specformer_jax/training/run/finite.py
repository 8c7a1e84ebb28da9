"""A loss that is not finite ends a run, and what made it so is named as far as it can be told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from specformer_jax.errors import UserError
from specformer_jax.training import placement
from specformer_jax.training.data import hook_store
from specformer_jax.training.run import content
from specformer_jax.training.run.checkpoint import Checkpoints
from specformer_jax.training.train_step import Frozen, StepMetrics, Trainer


def check(steps: Sequence[StepMetrics], done: int, checkpoints: Checkpoints, blame: Callable[[int], str]) -> None:
    """Raises UserError with the first of the last steps whose loss or gradient is not finite."""
    for step, metrics in enumerate(steps, done - len(steps) + 1):
        if not math.isfinite(metrics.loss) or not math.isfinite(metrics.gradient_norm):
            checkpoints.wait()
            raise UserError(
                f"the loss of step {step} is not finite (loss {metrics.loss}, gradient norm"
                f" {metrics.gradient_norm}; batch {step - 1}): the last good checkpoint is {checkpoints.steps[-1:]};"
                f" {blame(step - 1)}"
            )


def blame(trainer: Trainer, mesh: jax.sharding.Mesh, frozen: Frozen, tokens: np.ndarray) -> str:
    """What makes a loss not finite, as far as the target's part of it tells."""
    _, broken = content.examine(frozen.target)
    if broken:
        return f"the target's {broken[0]} is not finite"
    if jax.process_count() == 1:  # the hooks of several hosts are in no one place
        hooks = np.asarray(placement.compile_reader(trainer, mesh)(frozen, tokens))
        if not hook_store.all_finite(hooks):
            return f"the target's hidden states are not finite in {trainer.config.dtype}"
    return "a lower learning rate may help"
