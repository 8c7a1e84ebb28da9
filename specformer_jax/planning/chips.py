"""Chips as their data sheets describe them, and what is free on one while a model's weights are read."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip of a data sheet.

    Attributes:
      peak: bfloat16 FLOP/s, without sparsity.
      bandwidth: bytes/s of its memory.
      memory: its size in GiB.
      clock: cycles a second in which a TPU's compiler estimates; 0 for a GPU, whose compiler makes no estimate.
      kinds: how JAX's names of it begin (`jax.Device.device_kind`).
    """

    peak: float
    bandwidth: float
    memory: int
    clock: float = 0.0
    kinds: tuple[str, ...] = ()

    @property
    def rho(self) -> float:
        """The redundancy ratio for bfloat16 weights."""
        return redundancy(self.peak, self.bandwidth, weight_bytes=2)

    def least_seconds(self, flops: float, read_bytes: float) -> float:
        """No program takes less: its arithmetic at the peak or its reading at the bandwidth, whichever is longer."""
        return max(flops / self.peak, read_bytes / self.bandwidth)


CHIPS = {
    "v5e": Chip(197e12, 819e9, 16, 1.5e9, kinds=("TPU v5 lite", "TPU v5e")),
    "v6e": Chip(918e12, 1640e9, 32, 1.75e9, kinds=("TPU v6 lite", "TPU v6e")),
    "A100": Chip(312e12, 2039e9, 80, kinds=("NVIDIA A100",)),
    "H100": Chip(989e12, 3350e9, 80, kinds=("NVIDIA H100",)),
}


def chip_of(kind: str) -> Chip | None:
    """The chip that JAX calls so, None where its data sheet is not here.

    >>> chip_of("NVIDIA H100 80GB HBM3") is CHIPS["H100"], chip_of("cpu")
    (True, None)
    """
    return next((chip for chip in CHIPS.values() if kind.startswith(chip.kinds)), None)


def redundancy(flops: float, bandwidth: float, weight_bytes: int) -> float:
    """rho (paper eq. 1): how many tokens' arithmetic the time that one reading of the weights takes would hold.

    (FLOP/s over memory bytes/s) / (2 FLOP a weight over its bytes). A draft budget should keep k <= rho / batch.

    >>> redundancy(312e12, 1.56e12, weight_bytes=2)  # an A100 with 40 GB in bfloat16
    200.0
    """
    return (flops / bandwidth) / (2 / weight_bytes)
