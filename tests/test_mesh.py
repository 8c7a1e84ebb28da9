"""Decoding on a mesh of four devices gives the tokens of one device, with the kernels' shares inside shard_map."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import dataclasses
import jax
import test_decode, tiny
from specformer_jax import sharding
from specformer_jax.config import DraftConfig
from specformer_jax.draft import DraftHead
from specformer_jax.target import Target
import jax.numpy as jnp

draft = DraftConfig(max_draft_length=3, next_token_hook=True, attends_context=True, draft_vocab_size=8)
model, params = tiny.make(draft)
expected, _ = tiny.answers(model, params, test_decode.PROMPTS, test_decode.REQUESTS, k=3)
key, tokens = jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
hooks = jnp.zeros((1, 2, 4, tiny.CONFIG.width))
config = dataclasses.replace(tiny.CONFIG, vocab_size=14)
for data, model_axis in ((1, 2), (2, 2), (4, 1)):
    mesh = sharding.make_mesh(data=data, model=model_axis)
    shapes = {
        "target": jax.eval_shape(Target(config, dtype="float32").init, key, tokens, jnp.zeros(1, jnp.int32)),
        "draft": jax.eval_shape(DraftHead(config, model.head.config, "float32").init, key, hooks, hooks[:, :, 0]),
    }
    shardings = {name: sharding.param_shardings(shape["params"], mesh) for name, shape in shapes.items()}
    # The vocabulary of 13 does not divide: those two matrices stay whole.
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings["target"] |= {"embedding": whole, "lm_head": whole}
    placed = {name: jax.device_put(params[name], shardings[name]) for name in shardings}
    placed["draft_vocab"] = jax.device_put(params["draft_vocab"], whole)
    with jax.set_mesh(mesh):
        got, state = tiny.answers(model, placed, test_decode.PROMPTS, test_decode.REQUESTS, k=3)
    assert got == expected, (data, model_axis)
    assert int(state.accepted.sum()) > 0
    assert len(placed["target"]["layer_0"]["attention"]["qkv"]["kernel"].sharding.device_set) == data * model_axis
print("same tokens")
"""


@pytest.mark.slow
def test_the_same_tokens_on_a_mesh():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]),
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "same tokens" in done.stdout, done.stderr[-3000:]
