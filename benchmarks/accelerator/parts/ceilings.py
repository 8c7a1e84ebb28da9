"""Part 1: the device, how fast it copies and multiplies, and rho (paper eq. 1)."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks.accelerator.bench import COPY, PRODUCT, Bench, Unit, digits
from benchmarks.accelerator.findings import Figures
from benchmarks.accelerator.programs import repeated, repetitions, seconds
from pallas_kernels import why
from pallas_kernels.product.api import exact
from specformer_jax.planning.chips import redundancy

DTYPES = ("bfloat16", "float32")


def units(bench: Bench) -> Iterator[Unit]:
    yield Unit("device", 1, functools.partial(device, bench))
    yield Unit(COPY, 5, functools.partial(copy, bench))
    for dtype in DTYPES:
        yield Unit(PRODUCT.format(dtype), 10, functools.partial(product, bench, dtype))
    yield Unit("rho", 1, functools.partial(rho, bench))


def device(bench: Bench) -> Figures:
    """What the device says of itself, and whose kernels run on it."""
    found = jax.devices()[0]
    memory = found.memory_stats() or {}
    with bench.lowering():
        choice = why()
    return {
        "kind": found.device_kind,
        "count": jax.device_count(),
        "compute_capability": getattr(found, "compute_capability", None),
        "backend": found.client.platform_version.splitlines()[0],
        "memory_gib": round(memory.get("bytes_limit", 0) / 2**30, 1),
        "host_cores": os.cpu_count(),
        "kernels": f"{choice.implementation} for {choice.platform}: {choice.reason}",
    }


def copy(bench: Bench) -> Figures:
    """Bytes a second, those read and those written; in place, as an argument that is kept would be copied once more."""
    size = bench.sizes.copy_bytes
    count = repetitions(size / 1e12, bench.sizes.spell)

    @functools.partial(jax.jit, donate_argnums=0)
    def program(x):
        return jax.lax.fori_loop(0, count, lambda _, x: jax.lax.optimization_barrier(x + 1), x)

    x = jax.random.normal(jax.random.key(0), (size // 4,), jnp.float32)

    def call():
        nonlocal x
        x = program(x)
        return x

    return {"gbytes_per_second": digits(2 * size * count / seconds(call) / 1e9), "bytes": size}


def product(bench: Bench, dtype: str) -> Figures:
    """FLOP/s of a large product, accumulated in float32, as every product of a step is."""
    n = bench.sizes.gemm
    count = repetitions(2 * n**3 / (5e14 if dtype == "bfloat16" else 5e13), bench.sizes.spell)
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    multiply = lambda a, b: jnp.dot(a, b, precision=exact(a.dtype), preferred_element_type=jnp.float32).astype(a.dtype)
    program = jax.jit(repeated(multiply, count))
    return {"tflops": digits(2 * n**3 * count / seconds(lambda: program(a, b)) / 1e12), "size": n}


def rho(bench: Bench) -> Figures:
    """The redundancy ratio in bfloat16, and how many drafts that leaves each row of a batch."""
    chip = bench.ceiling("bfloat16")
    if chip is None:
        raise RuntimeError("the ceilings were not measured")
    found = redundancy(chip.peak, chip.bandwidth, weight_bytes=2)
    return {"rho": digits(found), "drafts_a_row": {str(b): digits(found / b) for b in sorted(bench.sizes.batches)}}
