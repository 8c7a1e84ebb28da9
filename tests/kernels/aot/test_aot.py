"""Every kernel form through the real TPU and CUDA compilers, without a TPU or a GPU (extras tpu-aot, gpu-aot)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("aot_cases.py")


def _compile(platform, *names):
    """What compiling the cases prints.

    In a process of its own: a compiler's plug-in must be found before JAX starts, and warns in its own way.
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(CASES.parents[3]), env.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, str(CASES), platform, *names], env=env, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    for i, name in enumerate(names):
        assert run.stdout.count(f"{name}: ") >= (31 if i else 112)
    return run.stdout


@pytest.mark.tpu_aot
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed (extra tpu-aot)")
def test_every_form_compiles_for_tpu():
    _compile("tpu", "v5e:2x4", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@pytest.mark.gpu_aot
@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="no CUDA plug-in (extra gpu-aot)")
def test_every_form_compiles_for_gpu():
    assert _compile("cuda", "H100", "A100").count("H100: Mosaic GPU: ") == 14
