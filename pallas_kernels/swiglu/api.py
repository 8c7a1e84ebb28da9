"""The gate of an FFN: silu(gate) * up, native on a CPU in bfloat16."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.swiglu import cpu, reference

NO_KERNEL = "XLA fuses a gate by itself"


def swiglu(
    gate_up: Float[Array, "*batch 2 F"], *, implementation: Implementation | None = None
) -> Float[Array, "*batch F"]:
    """silu(gate) * up of what one product gave for both. Differentiable: the reference runs then.

    Args:
      gate_up: the gate and what it lets through.
      implementation: None, "xla" or "native"; see `dispatch`.

    Raises:
      NotImplementedError: "native" was named and cannot run; it says why.
    """
    choice = dispatch.why(implementation, unsupported=NO_KERNEL, no_native=cpu.no_native_body(gate_up))
    return (cpu if choice.implementation == "native" else reference).swiglu(gate_up)
