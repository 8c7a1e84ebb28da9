"""Which implementation runs, and why: the one place that decides.

`None` asks for the best one on the platform that the program is *lowered for*: Mosaic on TPU, Triton on CUDA (Ampere
or newer), on a CPU the native body of an operation that has one, the jnp reference elsewhere. Mosaic GPU's bodies, for
Hopper, run where they are named: no device has yet shown them to be as good as Triton's. That platform is the default
backend's, unless the caller says otherwise, as ahead-of-time compilation must:

    with lowering_for("tpu"):
        jax.jit(step).trace(*abstract).lower(lowering_platforms=("tpu",)).compile()

The choice is made while tracing, so the compiled program holds one branch only. `lowering_for` is part of the cache
key of `jax.jit`: the same function may be traced for two platforms.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
from jax.sharding import AbstractDevice, AbstractMesh, get_abstract_mesh, use_abstract_mesh

from pallas_kernels import cpu

Implementation = Literal["pallas", "mosaic_gpu", "xla", "native"]
PLATFORMS = ("cpu", "tpu", "cuda")
NO_NATIVE_BODY = "this operation has no native body"
NO_MOSAIC_GPU_BODY = "this operation has no Mosaic GPU body"
NOT_BFLOAT16 = "Mosaic GPU bodies take bfloat16 alone, as Hopper's tensor cores would round float32"

_lowering_platform = jax.make_user_context(None)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs and the reason, as one sentence.

    Attributes:
      implementation: "pallas", "mosaic_gpu", "xla" or "native".
      platform: "tpu", "cuda" or "cpu": whose kernel body, or where the reference runs.
      interpret: whether the kernel is simulated on the CPU.
      reason: why this one was chosen.
    """

    implementation: Implementation
    platform: str
    interpret: bool
    reason: str

    @property
    def body(self) -> str:
        """Which of the Pallas bodies: "tpu", "cuda" (Triton's) or "mosaic_gpu"."""
        return "mosaic_gpu" if self.implementation == "mosaic_gpu" else self.platform


@contextlib.contextmanager
def lowering_for(platform: str, *, interpret: bool = False, native: bool = True) -> Iterator[None]:
    """Inside this context kernels are chosen for `platform` ("cpu", "tpu" or "cuda"), whatever runs here.

    With `interpret`, that platform's kernel bodies are simulated on the device at hand: how a CPU tests them. Without
    `native`, a CPU runs the references alone, as where no native body was built.
    """
    if platform not in PLATFORMS:
        raise ValueError(f"platform must be one of {PLATFORMS}, got {platform!r}")
    with _lowering_platform((platform, interpret, native)), _a_gpu_to_lower_for(platform, interpret):
        yield


def _a_gpu_to_lower_for(platform: str, interpret: bool) -> contextlib.AbstractContextManager[None]:
    """Names a GPU where there is none and no mesh of GPUs is set: from jax 0.11 on, Triton asks for one."""
    if platform != "cuda" or interpret or jax.default_backend() == "gpu" or not get_abstract_mesh().empty:
        return contextlib.nullcontext()
    gpu = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu))


def platform() -> str:
    """The platform that is lowered for: "tpu", "cuda", or "cpu" for everything without a kernel body of ours."""
    named = _lowering_platform.value
    if named is not None:
        return named[0]
    backend = jax.default_backend()
    if backend == "gpu":
        # ROCm and CUDA share the name "gpu"; our GPU bodies are compiled and checked for CUDA only.
        return "cuda" if "cuda" in jax.devices()[0].client.platform_version.lower() else "cpu"
    return backend if backend in PLATFORMS else "cpu"


def interpreting() -> bool:
    """Whether the kernel bodies of another platform are being simulated."""
    named = _lowering_platform.value
    return named is not None and named[1]


def device_kind() -> str | None:
    """The name of the device that runs what is lowered here; None where that is for a device that is not there."""
    named = _lowering_platform.value
    return jax.devices()[0].device_kind if named is None or named[1] else None


def native_ruled_out() -> bool:
    """Whether `lowering_for` keeps a CPU to the references."""
    named = _lowering_platform.value
    return named is not None and not named[2]


def native_unavailable() -> str | None:
    """Why no native body runs in what is lowered here, as a phrase; None where they do."""
    if platform() != "cpu":
        return f"the program is lowered for {platform()}"
    if native_ruled_out():
        return "native bodies are ruled out here (`lowering_for`)"
    if jax.sharding.get_abstract_mesh().size > 1:
        return "a mesh is set, over which XLA splits only what it knows"
    return cpu.unavailable()


def _capability() -> str | None:
    """The compute capability of the GPU at hand, None where the program is lowered for another machine."""
    here = platform() == "cuda" and _lowering_platform.value is None
    return jax.devices()[0].compute_capability if here else None


def mosaic_gpu_unavailable() -> str | None:
    """Why no Mosaic GPU body runs in what is lowered here, as a phrase; None where they do."""
    if platform() != "cuda":
        return f"the program is lowered for {platform()}"
    capability = _capability() or "9.0"
    return (
        None if capability == "9.0" else f"Mosaic GPU bodies are for compute capability 9.0, this GPU has {capability}"
    )


def why(
    implementation: Implementation | None = None,
    *,
    unsupported: str | None = None,
    no_native: str | None = None,
    no_mosaic_gpu: str | None = NO_MOSAIC_GPU_BODY,
) -> Choice:
    """Resolves `implementation` to what will run here.

    Args:
      implementation: None for the best one, or "pallas", "mosaic_gpu", "xla" or "native" to insist.
      unsupported: the reason why the Pallas kernel cannot run this call, or None if it can.
      no_native: the same of the native body.
      no_mosaic_gpu: the same of the Mosaic GPU body.

    Raises:
      ValueError: for an unknown name.
      NotImplementedError: "pallas", "mosaic_gpu" or "native" was named and cannot run; the message is the reason.
    """
    if implementation == "native" or (implementation is None and platform() == "cpu"):
        no_native = no_native or native_unavailable()
        if no_native is None:
            return Choice("native", "cpu", False, f"a native body was built for this CPU ({cpu.isa()})")
        if implementation == "native":
            raise NotImplementedError(f"implementation='native' cannot run: {no_native}")
    target, interpret = platform(), interpreting()
    if implementation == "mosaic_gpu":
        no_mosaic_gpu = no_mosaic_gpu or mosaic_gpu_unavailable()
        if no_mosaic_gpu is not None:
            raise NotImplementedError(f"implementation='mosaic_gpu' cannot run: {no_mosaic_gpu}")
        return Choice("mosaic_gpu", target, interpret, "the kernel was named")
    capability = _capability()
    if capability is not None and float(capability) < 8 and unsupported is None:
        unsupported = f"Triton needs compute capability 8.0, this GPU has {capability}"
    if implementation == "xla":
        return Choice("xla", target, False, "the reference was named")
    if implementation == "pallas":
        if unsupported is not None:
            raise NotImplementedError(f"implementation='pallas' cannot run: {unsupported}")
        if target == "cpu":
            return Choice("pallas", "tpu", True, "the kernel was named; a CPU interprets the TPU body")
        return Choice("pallas", target, interpret, "the kernel was named")
    if implementation is not None:
        raise ValueError(
            f"implementation must be None, 'pallas', 'mosaic_gpu', 'xla' or 'native', got {implementation!r}"
        )
    if target == "cpu":
        reason = f"this platform only interprets Pallas: the XLA reference is faster (native: {no_native})"
        return Choice("xla", target, False, reason)
    if unsupported is not None:
        return Choice("xla", target, False, unsupported)
    reason = f"{target} has a compiled kernel"
    if target == "cuda":
        reason += ", Triton's; Mosaic GPU's, for Hopper, has not been measured on a device and runs where it is named"
    return Choice("pallas", target, interpret, reason)
