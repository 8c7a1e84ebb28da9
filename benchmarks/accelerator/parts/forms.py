"""Part 2: every form of every kernel against its reference on the device, its time and its share of the ceiling.

What nothing may read is NaN: pages of no row, positions past a row's end, tokens that are nobody's, empty rows. The
references compute in float32 from the same numbers, with zeros there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.bench import Bench, Unit, sentence
from benchmarks.accelerator.findings import Figures
from benchmarks.accelerator.parts import cases
from benchmarks.accelerator.parts.cases import Case
from benchmarks.accelerator.programs import compile_all, repeated, repetitions, seconds
from pallas_kernels import why

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest value there is, as the kernels' tests have it
TIES = 0.01  # share of sampled tokens that may differ: the two best of a row may be closer than sums are exact


def units(bench: Bench) -> Iterator[Unit]:
    for dtype in bench.sizes.dtypes:
        for kernel, make in cases.FORMS.items():
            yield Unit(f"{kernel}, {dtype}", 12, functools.partial(check, bench, make, dtype))


def check(bench: Bench, make: Callable[[Any, Any], dict[str, Case]], dtype: str) -> Figures:
    """Compiles the forms of a kernel, compares and times them."""
    bodies = bench.bodies()
    if not bodies:
        return {"not_run": why().reason}
    with bench.lowering():
        made = make(bench.sizes, jnp.dtype(dtype))
        counts = {n: repetitions(bench.expected(c.flops, c.size, dtype), bench.sizes.spell) for n, c in made.items()}
        lowerings = {}
        for name, case in made.items():
            for body in bodies:
                kernel = functools.partial(case.function, implementation=body)
                lowerings[name, body] = lowered(repeated(kernel, counts[name], case.advance), case.operands)
            reference = functools.partial(case.function, implementation="xla")
            lowerings[name, "xla"] = lowered(repeated(reference, 1, case.advance), cases.upcast(case.clean))
        compiled = compile_all(lowerings, bench.workers)
    found: Figures = {}
    for name, case in made.items():
        reference = compiled[name, "xla"]
        wanted = reference if isinstance(reference, Exception) else reference(*cases.upcast(case.clean))
        for body in bodies:
            of_body = name if body == "pallas" else f"{name}, {body}"
            program = compiled[name, body]
            failed = next((x for x in (program, wanted) if isinstance(x, Exception)), None)
            if isinstance(failed, NotImplementedError):
                continue  # there is no such body
            if failed is not None:
                found[of_body] = {"failed_to_compile": sentence(failed)}
                continue
            error = compare(program(*case.operands), wanted)
            taken = seconds(functools.partial(program, *case.operands)) / counts[name]
            within = error["error"] <= TOLERANCE[dtype] and error.get("tokens_that_differ", 0.0) <= TIES
            found[of_body] = error | {"within": within} | bench.reached(taken, case.flops, case.size, dtype)
    return {"forms": found}


def lowered(function: Callable[..., Any], operands: tuple) -> Callable[[], jax.stages.Lowered]:
    """What `compile_all` takes."""
    return lambda: jax.jit(function).lower(*operands)


def compare(got: Any, wanted: Any) -> dict[str, float]:
    """The largest error over the largest value, and of whole numbers, which are tokens, the share that differs."""
    found = {"error": 0.0}
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        one, other = (
            np.asarray(x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x) for x in (one, other)
        )
        if other.dtype == np.int32:
            found["tokens_that_differ"] = round(float((one != other).mean()), 5)
            continue
        error = float(np.abs(one - other).max()) / max(1.0, float(np.abs(other).max()))
        found["error"] = float("inf") if not np.isfinite(one).all() else max(found["error"], error)
    return found
