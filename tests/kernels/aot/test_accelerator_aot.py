"""What `benchmarks.accelerator` runs through the real compilers, without a device (extras tpu-aot, gpu-aot)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("accelerator_cases.py")


def _compile(platform, *names):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(CASES.parents[3]), env.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, str(CASES), platform, *names], env=env, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    for name in names:
        lines = [line for line in run.stdout.splitlines() if line.startswith(f"{name}: ")]
        assert len(lines) >= 17 and any("AttentionBlocks" in line and line.endswith("compiled") for line in lines)


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed (extra tpu-aot)")
def test_a_tpus_programs_compile():
    _compile("tpu", "v5e:2x4", "v6e:2x2", "tpu7x:2x2x1")


@pytest.mark.gpu_aot
@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="no CUDA plug-in (extra gpu-aot)")
def test_a_gpus_programs_compile():
    _compile("cuda", "H100")
