"""Programs compiled side by side, and the seconds that a device takes for one of their repetitions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Name = TypeVar("Name", bound=Hashable)
ROUNDS = 3  # of a timing, whose median counts


def compile_all(
    lowerings: Mapping[Name, Callable[[], jax.stages.Lowered]], workers: int
) -> dict[Name, jax.stages.Compiled | Exception]:
    """Each program compiled, or why it could not be; tracing takes turns, compilers work side by side."""
    found: dict[Name, jax.stages.Compiled | Exception] = {}
    jobs: dict[Name, Future] = {}
    with ThreadPoolExecutor(workers) as pool:
        for name, lower in lowerings.items():
            try:
                jobs[name] = pool.submit(lower().compile)
            except Exception as error:
                found[name] = error
        for name, job in jobs.items():
            try:
                found[name] = job.result()
            except Exception as error:
                found[name] = error
    return {name: found[name] for name in lowerings}


def at_once(calls: list[Callable[[], Any]], workers: int) -> list[Any]:
    """What some calls return that trace, compile and run by themselves, all at work together.

    Raises:
      Exception: that of the first call that failed.
    """
    with ThreadPoolExecutor(workers) as pool:
        return [job.result() for job in [pool.submit(call) for call in calls]]


def repeated(
    function: Callable[..., Any],
    count: int,
    advance: Callable[[tuple, Any], tuple[tuple, Any]] = lambda operands, result: (operands, result),
) -> Callable[..., Any]:
    """One program that calls a function so many times in a row, and returns the last result.

    Nothing of a repetition can be left out or taken out of the loop, as its operands come through a barrier behind the
    result before. The number is static: a GPU would ask the host for another one before each repetition.

    Args:
      function: of the operands.
      count: how many times.
      advance: takes operands and what the function returned to the next operands and the result.
    """

    def run(*operands):
        empty = jax.eval_shape(lambda *o: advance(o, function(*o))[1], *operands)
        result = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)

        def once(_, carry):
            return jax.lax.optimization_barrier(advance(carry[0], function(*carry[0])))

        return jax.lax.fori_loop(0, count, once, (operands, result))[1]

    return run


def repetitions(expected: float, spell: float) -> int:
    """How many times a call that should take so long is repeated, for a timing of about a spell."""
    return max(1, min(200, round(spell / max(expected, 1e-7))))


def seconds(call: Callable[[], Any]) -> float:
    """The seconds of a call on the device, the median of a few behind one that warms up."""
    jax.block_until_ready(call())
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
