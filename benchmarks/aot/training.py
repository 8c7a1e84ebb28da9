"""The head's training step, target included, compiled for TPUs that are not there."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.aot.step import CompiledReport, report_on
from pallas_kernels import lowering_for
from specformer_jax.config import DraftConfig, TargetConfig
from specformer_jax.loading import weights
from specformer_jax.nn.mesh import make_mesh, param_shardings
from specformer_jax.training import placement, train_step
from specformer_jax.training.config import TrainConfig


def compile_training(
    devices, shape: tuple[int, int, int], target: TargetConfig
) -> tuple[jax.stages.Compiled, CompiledReport]:
    """Compiles one step of the paper's settings, one packed row of 1024 tokens for each of the data x fsdp shares.

    Args:
      devices: of a topology.
      shape: devices along data, fsdp and model.
      target: the frozen target, bfloat16.

    Returns:
      The compiled step and its report, whose `gathered_weights` are the all-gathers that FSDP needs.
    """
    mesh = make_mesh(*shape, devices=devices)
    config = TrainConfig(draft=DraftConfig(), batch_rows=shape[0] * shape[1], mesh=shape, remat=True).bind(target)
    trainer = train_step.Trainer(target, config)
    state = placement.abstract_state(trainer, mesh)
    boxed = weights.boxed_params(target)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s),
        nn.unbox(boxed),
        param_shardings(boxed, mesh),
    )
    R, T, J = config.batch_rows, config.sequence_length, config.draft.max_draft_length
    rows = placement.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=rows)
        for name, sizes in {"tokens": (R, T), "segments": (R, T), "anchors": (R, T), "labels": (R, T, J)}.items()
    }
    with lowering_for("tpu"):
        step: Any = placement.compile_step(trainer, mesh)
        traced = step.trace(state, train_step.Frozen(params), batch)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    donated = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    return compiled, report_on(compiled, "tpu", 0, donated, target)
