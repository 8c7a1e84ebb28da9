"""The head's training step compiles for TPU pods without one, with our kernels, and fits (extra tpu-aot).

TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python -m pytest -m tpu_aot tests/training/test_tpu_aot.py -s
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.aot.step import TARGETS


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("target", "topology", "mesh", "gib"),
    [
        ("qwen3-8b", "v5e:4x4", (1, 4, 4), 16),
        pytest.param("qwen3-8b", "v5e:16x16", (8, 4, 8), 16, marks=pytest.mark.slow),
        pytest.param("llama-3.1-8b", "v6e:4x4", (1, 4, 4), 32, marks=pytest.mark.slow),
    ],
)
def test_training_step(tmp_path, target, topology, mesh, gib):
    pytest.importorskip("libtpu")
    config = TARGETS[target]
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.tpu_aot", "--topologies", "--training", topology, "--target", target]
    command += ["--mesh", ",".join(map(str, mesh)), "--json", str(file)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)
    (record,) = json.loads(file.read_text())
    # Forward in every layer, the context attention and the draft block; both of these again in the backward pass.
    assert record["kernels"]["mixed_mask_attention"] >= config.layers + 2
    assert record["kernels"]["mixed_mask_attention_dkv"] >= 1
    assert record["kernels"]["grouped_rms_norm_downsample"] >= 1
    assert record["kernels"]["grouped_rms_norm_downsample_dkernel"] == 1
    assert record["hbm"] < gib * 2**30
    assert record["aliased"] >= record["donated"], "the state is not updated in place"
    # FSDP gathers a matrix at a time, its share of `model`: none is larger than the LM head's.
    largest = config.vocab_size * config.width // mesh[2] * 2
    gathered = [math.prod(map(int, x.split("[")[1][:-1].split(","))) * 2 for x in record["gathered_weights"]]
    assert max(gathered) <= largest


@pytest.mark.tpu_aot
def test_hooks_are_read_on_a_mesh():
    pytest.importorskip("libtpu")
    program = Path(__file__).with_name("reader_aot.py")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(program.parents[2]), env.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, str(program)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("ok") == 2
