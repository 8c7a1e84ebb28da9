"""AdamW and Muon with the schedules of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from specformer_jax.training.config import TrainConfig

# Which axes of a matrix are its input and its output; axes not named are a batch of matrices.
_MUON_AXES = {
    "downsampler/kernel": MuonDimensionNumbers((0, 1), 2),
    "fuse/kernel": MuonDimensionNumbers((0, 1), 2),
    "slots/kernel": MuonDimensionNumbers(0, 2),
    "qkv/kernel": MuonDimensionNumbers(0, (1, 2, 3)),
    "query/kernel": MuonDimensionNumbers(0, (1, 2, 3)),
    "kv/kernel": MuonDimensionNumbers(0, (1, 2, 3)),
    "gate/kernel": MuonDimensionNumbers(0, (1, 2, 3)),
    "out/kernel": MuonDimensionNumbers((0, 1), 2),
    "gate_up": MuonDimensionNumbers(0, 2),
    "ffn/down": MuonDimensionNumbers(0, 1),
    "kernel": MuonDimensionNumbers(0, 2),  # Medusa's; the first ending that fits counts
}


def make_schedule(config: TrainConfig, peak: float) -> optax.Schedule:
    """step -> learning rate: a linear warm-up from 0, then cosine or linear to the final rate at the last step."""
    warm = max(1, round(config.warmup * config.steps))
    final = min(config.final_learning_rate, peak)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warm, max(config.steps, warm + 1), final)
    down = optax.linear_schedule(peak, final, max(config.steps - warm, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warm), down], [warm])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The optimizer of a configuration, over the head's parameters."""
    rate = make_schedule(config, config.learning_rate)
    if config.optimizer == "adamw":
        chosen = optax.adamw(rate, weight_decay=config.weight_decay, mask=_matrices)
    else:
        adam = config.adam_learning_rate
        chosen = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_learning_rate=rate if adam is None else make_schedule(config, adam),
            muon_weight_dimension_numbers=muon_axes,
        )
    # Both have an empty state, so that a run may go on with another clip.
    return optax.chain(optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(), chosen)


def _matrices(params: Any) -> Any:
    """Which parameters are matrices: what weight decay acts on."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _axes(path) is not None, params)


def muon_axes(params: Any) -> Any:
    """`MuonDimensionNumbers` for each matrix of the head, None for scales, biases and embeddings."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _axes(path), params)


def _axes(path: Sequence[Any]) -> MuonDimensionNumbers | None:
    """Those of the parameter at a path of the tree."""
    name = "/".join(str(key.key) for key in path)
    for ending, numbers in _MUON_AXES.items():
        if name.endswith(ending):
            return numbers
    return None
