"""What the parts measure with, and how they are run: unit by unit, while there is time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import get_args

import jax
import jax.numpy as jnp

from benchmarks.accelerator.findings import Figures, Findings
from benchmarks.accelerator.sizes import Sizes
from benchmarks.harness.console import say
from pallas_kernels import lowering_for, why
from pallas_kernels.dispatch import Implementation
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.planning.chips import Chip

LOST = 75  # exit code of a process that has lost its device
COPY, PRODUCT = "copy", "product, {}"  # units of the first part that the others read


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the parts measure with.

    Attributes:
      sizes: how large everything is.
      findings: what was found so far.
      interpreted: the platform whose kernel bodies a CPU simulates; None where the device runs its own.
      load: loads the built-in model in a dtype.
      workers: how many programs are compiled side by side.
    """

    sizes: Sizes
    findings: Findings
    interpreted: str | None
    load: Callable[[str], LanguageModel]
    workers: int = min(12, os.cpu_count() or 1)

    def lowering(self) -> contextlib.AbstractContextManager[None]:
        """Around the tracing of programs with kernels in them."""
        return contextlib.nullcontext() if self.interpreted is None else lowering_for(self.interpreted, interpret=True)

    def bodies(self) -> dict[str, str]:
        """The kernels that run here by the name of their implementation, each with whose tile sizes it takes.

        None where the references run.
        """
        with self.lowering():
            choice = why()
        if choice.implementation != "pallas":
            return {}
        named = [name for name in get_args(Implementation) if name not in ("pallas", "xla", "native")]
        return {"pallas": choice.platform} | ({name: name for name in named} if choice.platform == "cuda" else {})

    def ceiling(self, dtype) -> Chip | None:
        """What the device reached in this dtype; None where that was not measured."""
        found = self.findings.of("ceilings")
        product = found.get(PRODUCT.format(jnp.dtype(dtype).name))
        if product is None or COPY not in found:
            return None
        memory = jax.devices()[0].memory_stats() or {}
        gib = memory.get("bytes_limit", 0) // 2**30
        return Chip(product["tflops"] * 1e12, found[COPY]["gbytes_per_second"] * 1e9, gib)

    def expected(self, flops: float, size: float, dtype) -> float:
        """About how long a program takes that computes and moves so much; a guess where no ceiling is known."""
        chip = self.ceiling(dtype)
        return 1e-4 if chip is None else 1.5 * chip.least_seconds(flops, size) + 5e-6

    def reached(self, seconds: float, flops: float, size: float, dtype) -> Figures:
        """How long something took, and what of the device that reached."""
        chip = self.ceiling(dtype)
        figures = {
            "microseconds": digits(seconds * 1e6),
            "gbytes_per_second": digits(size / seconds / 1e9),
            "tflops": digits(flops / seconds / 1e12),
        }
        if chip is not None:
            figures["share_of_ceiling"] = digits(chip.least_seconds(flops, size) / seconds)
        return figures


def digits(x: float) -> float:
    """The number with the digits that a measurement has.

    >>> digits(123.456), digits(0.000123456)
    (123.5, 0.0001235)
    """
    return float(f"{x:.4g}")


@dataclasses.dataclass(frozen=True)
class Unit:
    """The least that is run as a whole, kept as a whole, and left out as a whole.

    Attributes:
      name: as the report calls it; the same in every run.
      seconds: about what it takes on an accelerator, compiling included.
      measure: runs it.
    """

    name: str
    seconds: float
    measure: Callable[[], Figures]


def run_part(findings: Findings, part: str, units: Iterator[Unit], end: float) -> None:
    """Runs the units that have no figures yet and fit before `end`; a unit that fails is a line in the report.

    Where the device is lost the process ends with code `LOST`: a new one may find it again.
    """
    taken, guessed = 0.0, 0.0
    for unit in _whole(findings, part, units):
        if findings.has(part, unit.name):
            continue
        left = end - time.monotonic()
        # What the part's units took so far tells how wrong the guesses are here.
        needs = unit.seconds * (taken / guessed if guessed else 1.0)
        if needs > left:
            findings.leave_out(
                part, unit.name, f"it takes about {needs:.0f} s, of which {max(left, 0):.0f} s were left"
            )
            continue
        findings.start(part, unit.name)
        begin = time.monotonic()
        try:
            figures = unit.measure()
        except Exception as error:
            figures = {"failed": sentence(error)}
        seconds = time.monotonic() - begin
        taken, guessed = taken + seconds, guessed + unit.seconds
        lost = "failed" in figures and not _still_there()
        findings.add(
            part, unit.name, figures | {"seconds": round(seconds, 1)} | ({"ended_the_process": True} if lost else {})
        )
        say(f"{part}, {unit.name}: {figures.get('failed', f'{seconds:.1f} s')}")
        if lost:
            say("the device is lost: the rest goes on in a new process")
            os._exit(LOST)  # whoever still holds arrays there would wait for them


def _whole(findings: Findings, part: str, units: Iterator[Unit]) -> Iterator[Unit]:
    """The units; where there can be none, that is a line in the report, too."""
    try:
        yield from units
    except Exception as error:
        findings.add(part, "beginning", {"failed": sentence(error)})
        say(f"{part}: {sentence(error)}")


def sentence(error: Exception) -> str:
    """What went wrong, in a line."""
    text = str(error).strip()
    if isinstance(error, UserError):
        return text
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower() or isinstance(error, MemoryError):
        return f"out of memory: {text.splitlines()[0][:200] if text else 'of the host'}"
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else 'no message'}"


def _still_there() -> bool:
    """Whether the device still runs anything: after a wrong address in a kernel a GPU does not."""
    try:
        jax.block_until_ready(jnp.ones(8) + 1)
    except jax.errors.JaxRuntimeError:
        return False
    return True
