"""What the machine can do: arithmetic, memory, and their ratio rho (paper eq. 1)."""

from __future__ import annotations

import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from specformer_jax.planning.chips import redundancy

GEMM_SIZE = 2048
COPY_BYTES = 256 * 2**20
REPEATS = 7


def measure(dtype: str) -> dict[str, Any]:
    """A small matrix product and a copy, each the median of a few.

    Args:
      dtype: that of the weights, on which rho depends.
    """
    x = jnp.ones((GEMM_SIZE, GEMM_SIZE), dtype)
    # What a decode step does: products in the weights' dtype, accumulated in float32.
    product = jax.jit(lambda a, b: jnp.einsum("ij,jk->ik", a, b, preferred_element_type=jnp.float32))
    flops = 2 * GEMM_SIZE**3 / _seconds(product, x, x)
    bandwidth = 2 * COPY_BYTES / _seconds_in_place(jax.jit(lambda a: a + 1, donate_argnums=0))  # one read, one write
    return {
        "device": _device(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "gemm_gflops": round(flops / 1e9, 1),
        "copy_gbytes": round(bandwidth / 1e9, 1),
        "rho": round(redundancy(flops, bandwidth, jnp.dtype(dtype).itemsize), 2),
    }


def _seconds(function, *arguments) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _seconds_in_place(function) -> float:
    """Of a function that takes over its argument: new memory would have to be mapped first, which takes longer."""
    block = function(jnp.zeros(COPY_BYTES // 4, jnp.float32))
    times = []
    for _ in range(REPEATS):
        jax.block_until_ready(block)
        begin = time.perf_counter()
        block = jax.block_until_ready(function(block))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "cpu"
