"""The training step compiles for TPU pods without one, and fits (extra tpu-aot).

TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python -m pytest -m tpu_aot tests/training/test_tpu_aot.py -s
"""

from __future__ import annotations

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from specformer_jax import sharding, train_step
from specformer_jax.config import DraftConfig, RopeScaling, TargetConfig
from specformer_jax.target import Target
from specformer_jax.train_config import TrainConfig

QWEN3_8B = TargetConfig(
    "qwen3", 151936, 4096, 36, 32, 8, 128, 12288, 40960, rope_theta=1e6, qk_norm=True, eos_ids=(151645,)
)
LLAMA_3_1_8B = TargetConfig(
    "llama", 128256, 4096, 32, 32, 8, 128, 14336, 131072, rope_theta=5e5, rms_epsilon=1e-5,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), eos_ids=(128009,),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("target", "topology", "shape", "hbm_gb"),
    [(QWEN3_8B, "v5e:16x16", (8, 4, 8), 16), (LLAMA_3_1_8B, "v6e:4x4", (1, 4, 4), 32)],
    ids=["qwen3-8b-v5e-256", "llama-3.1-8b-v6e-16"],
)
def test_training_step_fits(target, topology, shape, hbm_gb):
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = sharding.make_mesh(*shape, devices=devices)
    config = TrainConfig(draft=DraftConfig().bind(target), batch_rows=shape[0] * shape[1], mesh=shape, remat=True)
    config.check(target, len(devices))
    trainer = train_step.Trainer(target, config)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    state = jax.tree.map(place, jax.eval_shape(trainer.init, jax.random.key(0)), trainer.state_shardings(mesh))
    boxed = jax.eval_shape(
        Target(target).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32)
    )
    target_params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s),
        nn.unbox(boxed)["params"],
        sharding.param_shardings(boxed, mesh)["params"],
    )
    R, T, J = config.batch_rows, config.sequence_length, config.draft.max_draft_length
    rows = train_step.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=rows)
        for name, sizes in {"tokens": (R, T), "segments": (R, T), "anchors": (R, T), "labels": (R, T, J)}.items()
    }
    step = train_step.compile_step(trainer, mesh)
    compiled = step.trace(state, train_step.Frozen(target_params), batch).lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    used -= memory.alias_size_in_bytes
    print(f"\n{topology}: {used / 2**30:.2f} GiB of HBM a chip ({memory.temp_size_in_bytes / 2**30:.2f} temporary)")
    assert used < hbm_gb * 2**30
