"""What `benchmarks.accelerator` runs, compiled ahead of time for a chip that is not there: a script of its own process.

    python tests/kernels/aot/accelerator_cases.py tpu v5e:2x4 v6e:2x2
    python tests/kernels/aot/accelerator_cases.py cuda H100

Every form of every kernel, every tile size that is tried, and steps of Qwen3-8B's sizes cut to two layers. A tile size
may be refused, as there: its line says why. Prints a line for each program.
"""

from __future__ import annotations

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.accelerator.parts import cases, steps, tiles
from benchmarks.accelerator.parts.steps import Step, Timed
from benchmarks.accelerator.programs import repeated
from benchmarks.accelerator.sizes import DEVICE, PAPER
from benchmarks.aot.step import QWEN3_8B
from pallas_kernels import lowering_for, tuning
from specformer_jax.config import Shape
from specformer_jax.decoding import decode
from tests.kernels.aot.aot_cases import compile_for, device

SIZES = dataclasses.replace(DEVICE, rows=16)
DTYPE = jnp.dtype("bfloat16")


def abstract(platform: str, make) -> dict[str, tuple[cases.Case, tuple]]:
    """The cases that `make` gives, their operands as shapes."""
    made = {}

    def operands():
        made.update(make(SIZES, DTYPE))
        return {name: case.operands for name, case in made.items()}

    with lowering_for(platform):
        shapes = jax.eval_shape(operands)
    return {name: (case, shapes[name]) for name, case in made.items()}


def compile_case(platform: str, target, case: cases.Case, operands: tuple) -> None:
    """Three repetitions of a kernel as one program."""
    kernel = functools.partial(case.function, implementation="pallas")
    compile_for(platform, target, repeated(kernel, 3, case.advance), *operands)


def compile_steps(platform: str, name: str, target) -> None:
    """A plain step and one with drafts."""
    config = dataclasses.replace(QWEN3_8B, layers=2)
    timed = Timed("qwen3-8b", config, PAPER.bind(config))
    here = SingleDeviceSharding(target)
    for step in (Step(1, True), Step(1, False), Step(5, False)):
        with lowering_for(platform):
            (model, *arrays), named = steps.arguments(timed, step, Shape(16, 1 + steps.DRAFTS, 64, 2304))
            arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arrays)
            decode.jit_run.trace(model, *arrays, **named).lower(lowering_platforms=(platform,)).compile()
        print(f"{name}: {steps.describe(step)}: compiled", flush=True)


def main(platform: str, names: list[str]) -> None:
    """Compiles everything for every named device."""
    for name in names:
        target = device(platform, name)
        for make in cases.FORMS.values():
            for form, (case, operands) in abstract(platform, make).items():
                compile_case(platform, target, case, operands)
                print(f"{name}: {form}: compiled", flush=True)
        compile_steps(platform, name, target)
        windows = abstract(
            platform, lambda sizes, dtype: {"": cases.ragged(sizes, sizes.heads[0], dtype, 5, sizes.rows)}
        )
        for blocks in tiles.candidates(platform, "attention", "window"):
            try:
                with tuning.using(blocks):
                    compile_case(platform, target, *windows[""])
            except jax.errors.JaxRuntimeError as error:
                print(f"{name}: {blocks}: {str(error).splitlines()[0][:150]}", flush=True)
            else:
                print(f"{name}: {blocks}: compiled", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
