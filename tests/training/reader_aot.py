"""Compiles the reading of hooks (`fit --offline`) for four TPU chips that are not there; a program of its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels import lowering_for
from specformer_jax.config import DraftConfig, TargetConfig
from specformer_jax.loading import weights
from specformer_jax.nn.mesh import make_mesh, param_shardings
from specformer_jax.training import placement, train_step
from specformer_jax.training.config import TrainConfig

TARGET = TargetConfig("llama", 512, 256, 2, 4, 4, 64, 512, 256, eos_ids=(2,))


def main() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    boxed = weights.boxed_params(TARGET)
    for shape in ((4, 1, 1), (1, 1, 4)):
        mesh = make_mesh(*shape, devices=devices)
        config = TrainConfig(draft=DraftConfig(max_draft_length=4), sequence_length=128, batch_rows=4, mesh=shape)
        trainer = train_step.Trainer(TARGET, config.bind(TARGET))
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding)
        params = jax.tree.map(place, nn.unbox(boxed), param_shardings(boxed, mesh))
        rows = jax.ShapeDtypeStruct((4, 128), jnp.int32)
        with lowering_for("tpu"):
            traced = placement.compile_reader(trainer, mesh).trace(train_step.Frozen(params), rows)
            traced.lower(lowering_platforms=("tpu",)).compile()
        print(shape, "ok")


if __name__ == "__main__":
    main()
