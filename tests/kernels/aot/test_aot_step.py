"""The whole decode step of Qwen3-8B with the head, compiled for eight TPU chips that are not there (extra tpu-aot)."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

GIB = {"v5e:2x4": 16, "v6e:2x4": 32}
# HBM traffic over weights and cache once. On v6e XLA takes some layers' caches into VMEM to write a window and back.
TRAFFIC = {"v5e:2x4": 1.15, "v6e:2x4": 1.5}
needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed (extra tpu-aot)"
)


def _report(tmp_path, *arguments):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.tpu_aot", *arguments, "--json", str(file)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(file.read_text())


def _check(record):
    layers = 36 + 2  # the head adds its context attention and its draft block
    expected = {"mixed_mask_attention": layers, "sample_hidden": 2, "grouped_rms_norm_downsample": 1}
    assert record["kernels"] == expected
    free = GIB[record["topology"]] - record["hbm"] / 2**30
    print(f"{record['topology']} {record['rows']} rows: {free:.2f} GiB of HBM free")
    assert free > 0
    assert record["aliased"] >= record["donated"], "the cache is not updated in place"
    assert not record["logits"], "an array of logits exists"
    assert not record["gathered_weights"], "weights are gathered"
    assert sum(record["traffic"].values()) <= TRAFFIC[record["topology"]] * record["ideal_bytes"]


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", GIB)
def test_the_step_on_eight_tpus(tmp_path, topology):
    for record in _report(tmp_path, "--topologies", topology, "--rows", "64", "128", "--k", "4", "--training"):
        _check(record)


@pytest.mark.tpu_aot
@needs_libtpu
def test_a_servers_step_that_may_rule_tokens_out(tmp_path):
    options = ["--topologies", "v5e:2x4", "--rows", "64", "--k", "4", "--training", "--truncation"]
    [record] = _report(tmp_path, *options)
    assert record["kernels"]["sample_logits"] == 1 and record["kernels"]["sample_hidden"] == 1
    assert GIB["v5e:2x4"] * 2**30 > record["hbm"]
    assert record["aliased"] >= record["donated"], "the cache is not updated in place"
    assert not record["gathered_weights"], "weights are gathered"


@pytest.mark.gpu_aot
@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="no CUDA plug-in (extra gpu-aot)")
def test_the_step_on_one_and_eight_gpus():
    command = [sys.executable, "-m", "benchmarks.gpu_aot"]
    run = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    assert len(lines) == 2 and all("cache in place, weights gathered: none" in line for line in lines)
    assert all(float(line.split(" of 80 GiB")[0].split()[-1]) < 75 for line in lines)
