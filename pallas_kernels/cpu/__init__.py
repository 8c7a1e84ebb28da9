"""The native kernel bodies of a CPU, C++ behind `jax.ffi`: the library that `pip install` built, loaded when asked for.

`SPECFORMER_CPU_ISA` names one of the instruction sets it was compiled for ("amx_bf16", "avx512_bf16", "avx512", "avx2",
"plain") in place of the best that the CPU runs, `SPECFORMER_THREADS` the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os

import jax

from pallas_kernels.cpu import sources

TARGETS = (
    "specformer_four_bit_product",
    "specformer_product",
    "specformer_product_of_rows",
    "specformer_ragged_attention",
    "specformer_rms_norm",
    "specformer_rotary",
    "specformer_sample_hidden",
    "specformer_sample_logits",
    "specformer_swiglu",
)


def unavailable() -> str | None:
    """Why no native body can run here, as a phrase; None where they can, and then XLA knows them."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def isa() -> str:
    """The instruction set whose bodies run."""
    return _library().specformer_isa().decode()


def isas() -> tuple[str, ...]:
    """The instruction sets that this CPU runs, best first."""
    return tuple(_library().specformer_isas().decode().split())


def _library() -> ctypes.CDLL:
    loaded = _load()
    if isinstance(loaded, str):
        raise NotImplementedError(f"no native body can run: {loaded}")
    return loaded


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, its bodies registered with XLA, or why there is none."""
    found = importlib.util.find_spec("pallas_kernels.cpu._native")
    if found is None or found.origin is None:
        return "native bodies were not built; install with a C++ compiler at hand, `pip install -v` shows what it says"
    try:
        library = ctypes.CDLL(found.origin)
        for name in ("specformer_isa", "specformer_isas", "specformer_sources"):
            getattr(library, name).restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return f"the library of native bodies does not load ({error}); install again"
    if library.specformer_sources().decode() != sources.fingerprint():
        return "native bodies were built from other sources than are here; install again"
    if library.specformer_isa() is None:
        named, runs = os.environ["SPECFORMER_CPU_ISA"], library.specformer_isas().decode()
        return f"SPECFORMER_CPU_ISA={named} is no instruction set that this CPU runs ({runs})"
    try:
        for name in TARGETS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except jax.errors.JaxRuntimeError as error:  # headers of a newer XLA than the one that runs
        return f"this jaxlib does not take the native bodies ({error}); install again"
    return library
