"""The whole decode step of Qwen3-8B with the head, compiled for eight TPU chips that are not there (extra tpu-aot)."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

GIB = {"v5e:2x4": 16, "v6e:2x4": 32}
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


def _check(record, layers):
    k = record["k"]
    calls = layers + 2 * (k > 0)  # every layer; with the head its context attention and its draft block
    assert record["kernels"]["mixed_mask_attention"] == calls
    assert record["kernels"]["sample_hidden"] == 1 + (k > 0)
    assert record["kernels"].get("grouped_rms_norm_downsample", 0) == (k > 0)
    assert record["hbm"] < GIB[record["topology"]] * 2**30
    assert record["aliased"] >= record["cache"], "the cache is not updated in place"
    assert not record["logits"], "an array of logits exists"
    assert not record["gathered_weights"], "weights are gathered"
    traffic = sum(record["traffic"].values())
    if layers == 36:  # with fewer the LM head and the fixed parts weigh more
        assert traffic <= 1.15 * record["ideal_bytes"]
    return traffic


@pytest.mark.tpu_aot
@needs_libtpu
def test_two_layers_of_the_step(tmp_path):
    (record,) = _report(tmp_path, "--topologies", "v5e:2x4", "--rows", "64", "--k", "4", "--layers", "2")
    _check(record, 2)


@pytest.mark.slow
@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", GIB)
@pytest.mark.parametrize("rows", [64, 128])
def test_the_step_and_what_speculation_adds(tmp_path, topology, rows):
    plain, spec = _report(tmp_path, "--topologies", topology, "--rows", str(rows), "--k", "0", "4")
    ratio = _check(spec, 36) / _check(plain, 36)
    print(f"{topology} {rows} rows: a step with the head moves {ratio:.2f}x the bytes of a plain one")
    assert rows > 64 or ratio <= 1.25


@pytest.mark.gpu_aot
@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="no CUDA plug-in (extra gpu-aot)")
@pytest.mark.parametrize("layers", [2, pytest.param(36, marks=pytest.mark.slow)])
def test_the_step_on_one_and_eight_gpus(layers):
    command = [sys.executable, "-m", "benchmarks.gpu_aot", "--layers", str(layers)]
    run = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    assert len(lines) == 2 and all("cache in place" in line for line in lines)
    assert all(float(line.split(" of 80 GiB")[0].split()[-1]) < 75 for line in lines)
