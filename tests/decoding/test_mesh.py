"""Decoding on a mesh of four devices gives the tokens of one device, with the kernels' shares inside shard_map."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import QUICK

SCRIPT = """
import dataclasses
import sys
import jax
import jax.numpy as jnp
from tests.decoding import by_hand, test_decode
from tests import tiny
from specformer_jax.nn.mesh import make_mesh, param_shardings
from specformer_jax.config import DraftConfig
from specformer_jax.loading import head_checkpoint, weights

drafter = sys.argv[1]
draft = DraftConfig(max_draft_length=3, next_token_hook=True, attends_context=True, draft_vocab_size=8)
draft = dataclasses.replace(draft, drafter=drafter, draft_blocks=2 if drafter in ("dflash", "kv") else 1)
model, params = tiny.make(draft)
expected, _ = tiny.answers(model, params, test_decode.PROMPTS, test_decode.REQUESTS, k=3)


def answers(params, size, chunk):
    # Rows that come one after the other and leave early, beside prompts; and how often their drafts were accepted.
    state = by_hand.empty(model, 4, drafts=3)
    for row, i in enumerate((3, 0, 1, 2)):
        state = by_hand.admit(state, row, test_decode.PROMPTS[i], test_decode.REQUESTS[i])
        state = by_hand.step(model, params, state, size=size, chunk=chunk)
    state = by_hand.finish(model, params, state, size=size, chunk=chunk)
    return [by_hand.answer(state, row) for row in (1, 2, 3, 0)], state.accepted.tolist()


config = dataclasses.replace(tiny.CONFIG, vocab_size=14)
for data, model_axis in ((1, 2), (2, 2), (4, 1)):
    mesh = make_mesh(data=data, model=model_axis)
    shapes = {
        "target": weights.boxed_params(config),
        "draft": head_checkpoint.boxed_params(config, model.drafter.config),
    }
    shardings = {name: param_shardings(shape, mesh) for name, shape in shapes.items()}
    # The vocabulary of 13 does not divide: those two matrices stay whole.
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings["target"] |= {"embedding": whole, "lm_head": whole}
    placed = {name: jax.device_put(params[name], shardings[name]) for name in shardings}
    placed["draft_vocab"] = jax.device_put(params["draft_vocab"], whole)
    with jax.set_mesh(mesh):
        got, state = tiny.answers(model, placed, test_decode.PROMPTS, test_decode.REQUESTS, k=3)
    assert got == expected, (data, model_axis)
    assert int(state.accepted.sum()) > 0
    for size, chunk in ((8, 4), (5, 3), (20, 8)):
        with jax.set_mesh(mesh):
            mixed = answers(placed, size, chunk)
        assert mixed[0] == expected, (data, model_axis, size)
        if size % data:  # what does not divide is kept whole: then even the drafts that are read are the same
            assert mixed[1] == answers(params, size, chunk)[1], (data, model_axis, size)
    assert len(placed["target"]["layer_0"]["attention"]["qkv"]["kernel"].sharding.device_set) == data * model_axis
print("same tokens")
"""


COMMANDS = """
import json, sys
import jax
import serve
from specformer_jax.batch.conversations import Conversation
from specformer_jax.loading.language_model import load
from specformer_jax.nn.mesh import make_mesh
from specformer_jax.training.distillation import distill
from specformer_jax.training.config import DistillConfig

target, head, folder = sys.argv[1:]
mesh = make_mesh(data=2, model=2)
lm = load(target, draft=head, dtype="float32", mesh=mesh)
assert len(lm.params["draft"]["context_attention"]["qkv"]["kernel"].sharding.device_set) == 4
assert lm.params["draft"]["context_attention"]["qkv"]["kernel"].sharding.spec[1] == "model"
one = load(target, draft=head, dtype="float32")
prompts = [Conversation(str(i), ("w5 " * (i + 1),)) for i in range(6)]
config = DistillConfig((0.0, 0.8), max_new_tokens=8, max_prompt_tokens=14, batch_size=4, shard_size=4)
distill.distill(lm, prompts, config, folder + "/mesh", mesh=mesh)
distill.distill(one, prompts, config, folder + "/one")
for number in range(2):
    name = f"/shard-0000{number}.jsonl"
    assert open(folder + "/mesh" + name).read() == open(folder + "/one" + name).read()

ids = []
for flags in ([], ["--mesh", "2,1,2"]):
    output = f"{folder}/answers{len(flags)}.jsonl"
    common = ["generate", "--target", target, "--draft", head, "--draft-length", "2", "--dtype", "float32", "--quiet"]
    prompts = [text for prompt in ("w5 w6", "w7", "w9 w8 w7") for text in ("--prompt", prompt)]
    assert serve.main([*common, *prompts, "--max-new-tokens", "12", "--output", output, *flags]) == 0
    ids.append(sorted(json.dumps(json.loads(line)) for line in open(output)))
assert ids[0] == ids[1]
print("same tokens")
"""


def _run(script, *arguments, flags=""):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {flags}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "same tokens" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["specformer", "dflash", "kv"])
def test_the_same_tokens_on_a_mesh(drafter):
    """Nearly all of its time is compiling, so that is done quickly; the commands below run what users run."""
    _run(SCRIPT, drafter, flags=QUICK)


@pytest.mark.slow
def test_the_commands_on_a_mesh(tiny_target, tiny_head, tmp_path):
    """`serve.py generate --mesh` and distillation with `distill.mesh` give the tokens of one device."""
    _run(COMMANDS, tiny_target, tiny_head, tmp_path)
