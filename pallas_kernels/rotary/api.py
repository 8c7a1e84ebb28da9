"""Queries, keys and values out of one product, turned by their rotary angles; native on a CPU in bfloat16."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.rotary import cpu, reference

NO_KERNEL = "XLA fuses a rotation by itself"


def split_and_rotate(
    qkv: Float[Array, "*batch K M H"],
    cos: Float32[Array, "*batch H/2"],
    sin: Float32[Array, "*batch H/2"],
    *,
    implementation: Implementation | None = None,
) -> reference.Heads:
    """The heads that one product gave, queries and keys at their positions. Differentiable: the reference runs then.

    Args:
      qkv: for each key/value head its queries, the key and the value, side by side.
      cos: the cosines of the rotary angles, one for each pair of channels i and i + H/2.
      sin: their sines.
      implementation: None, "xla" or "native"; see `dispatch`.

    Raises:
      NotImplementedError: "native" was named and cannot run; it says why.
    """
    choice = dispatch.why(implementation, unsupported=NO_KERNEL, no_native=cpu.no_native_body(qkv))
    return (cpu if choice.implementation == "native" else reference).split_and_rotate(qkv, cos, sin)
