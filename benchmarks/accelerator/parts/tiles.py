"""Part 4: the fastest tile sizes of attention and of sampling on this device, as a table for `pallas_kernels`.

A last token with its drafts is tuned apart from pieces of prompts. Every candidate has to give what the sizes in use
give; it is taken if it is faster over all cases together, by the mean of the ratios.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Iterator, Sequence

import jax.numpy as jnp

from benchmarks.accelerator.bench import Bench, Unit, digits, sentence
from benchmarks.accelerator.findings import Figures, Findings
from benchmarks.accelerator.parts import cases
from benchmarks.accelerator.parts.cases import Case
from benchmarks.accelerator.parts.forms import TOLERANCE, compare, lowered
from benchmarks.accelerator.programs import compile_all, repeated, repetitions, seconds
from pallas_kernels import dispatch, tuning
from pallas_kernels.tuning import AttentionBlocks, Blocks, SampleBlocks, TileKey
from specformer_jax import files

DTYPE = "bfloat16"
WORTH = 0.02  # a gain below that is noise


def units(bench: Bench) -> Iterator[Unit]:
    tuned = {("attention", "window"): 45, ("attention", "decode"): 25, ("sampling", "decode"): 30}
    for implementation, body in bench.bodies().items():
        for (kernel, size), about in tuned.items():
            name = ", ".join([kernel, size, *[implementation] * (implementation != "pallas")])
            yield Unit(name, about, functools.partial(tune, bench, implementation, body, kernel, size))


def candidates(body: str, kernel: str, size: str) -> list[Blocks]:
    """What is tried of somebody's kernels, beside the sizes in use."""
    if kernel == "sampling":
        columns = {"tpu": (256, 512, 1024, 2048), "cuda": (64, 128, 256)}.get(body, (64, 128))
        rows = {"tpu": (512,), "cuda": (16, 32, 64)}.get(body, (64, 128))
        return [
            SampleBlocks(*sizes) for sizes in itertools.product(rows, columns, (64, 128) if body == "cuda" else (64,))
        ]
    positions = (256, 512, 1024, 2048) if body == "tpu" else (16, 32, 64)
    rows = {"tpu": (64,), "cuda": (16, 32, 64)}.get(body, (64,)) if size == "window" else (32, 64, 128)
    return [AttentionBlocks(*sizes) for sizes in itertools.product(rows, positions)]


def calls(bench: Bench, kernel: str, size: str) -> dict[str, Case]:
    """What the candidates are timed on."""
    s, dtype = bench.sizes, jnp.dtype(DTYPE)
    if kernel == "sampling":
        return {"LM head": cases.sampling(s, dtype)["LM head"]}
    tokens = {f"{n} tokens": n for n in s.windows} if size == "window" else {"piece of a prompt": s.chunk}
    rows = s.rows if size == "window" else max(1, s.rows // 8)
    return {
        f"{name}, {heads.name}": cases.ragged(s, heads, dtype, n, rows)
        for heads in s.heads
        for name, n in tokens.items()
    }


def tune(bench: Bench, implementation: str, body: str, kernel: str, size: str) -> Figures:
    """Times the sizes in use and the candidates on every case, and keeps the best."""
    with bench.lowering():
        timed = calls(bench, kernel, size)
        tried = candidates(body, kernel, size)[: bench.sizes.candidates]
        key = TileKey(dispatch.device_kind() or "", body, kernel, DTYPE, size)
        try:
            times = time_all(bench, implementation, timed, [None, *tried])
        except NotImplementedError as error:
            return {"not_run": str(error)}
    whole = {blocks: found for blocks, found in times.items() if isinstance(found, list)}
    before = whole.pop(None)
    gains = {
        blocks: statistics.geometric_mean(old / new for old, new in zip(before, found, strict=True))
        for blocks, found in whole.items()
    }
    best = max(gains, key=lambda blocks: gains[blocks], default=None)
    figures: Figures = {
        "key": key._asdict(),
        "microseconds_before": micro(timed, before),
        "failed_candidates": {describe(b): found for b, found in times.items() if isinstance(found, str)},
        "gains": {describe(blocks): round(gain, 3) for blocks, gain in gains.items()},
        "gain": 1.0,
        "tiles": None,
    }
    if best is not None and gains[best] > 1 + WORTH:
        figures |= {
            "gain": round(gains[best], 3),
            "tiles": dataclasses.asdict(best),
            "microseconds_after": micro(timed, whole[best]),
        }
    return figures


def time_all(
    bench: Bench, implementation: str, timed: dict[str, Case], tried: Sequence[Blocks | None]
) -> dict[Blocks | None, list[float] | str]:
    """The seconds of each case under each tile sizes, None for those in use; or why a candidate is out."""
    counts = {n: repetitions(bench.expected(c.flops, c.size, DTYPE), bench.sizes.spell) for n, c in timed.items()}

    def lower(blocks: Blocks | None, name: str):
        kernel = functools.partial(timed[name].function, implementation=implementation)
        program = lowered(repeated(kernel, counts[name], timed[name].advance), timed[name].operands)
        if blocks is None:
            return program()
        with tuning.using(blocks):
            return program()

    pairs = itertools.product(tried, timed)
    compiled = compile_all({pair: functools.partial(lower, *pair) for pair in pairs}, bench.workers)
    found: dict[Blocks | None, list[float] | str] = {}
    wanted = {}
    for blocks in tried:
        times: list[float] = []
        for name, case in timed.items():
            program = compiled[blocks, name]
            if isinstance(program, Exception):
                if blocks is None:
                    raise program
                found[blocks] = f"{name}: {sentence(program)}"
                break
            result = program(*case.operands)
            error = compare(result, wanted.setdefault(name, result))
            if error["error"] > TOLERANCE[DTYPE]:
                found[blocks] = f"{name}: another result, {error}"
                break
            times.append(seconds(lambda program=program, case=case: program(*case.operands)) / counts[name])
        else:
            found[blocks] = times
    return found


def describe(blocks: Blocks) -> str:
    """The sizes in a line."""
    return ", ".join(f"{name} {n}" for name, n in dataclasses.asdict(blocks).items())


def micro(timed: dict[str, Case], times: Sequence[float]) -> dict[str, float]:
    """Microseconds by case."""
    return {name: digits(s * 1e6) for name, s in zip(timed, times, strict=True)}


def take_over(findings: Findings) -> None:
    """The rest of the run uses the best tiles, and `tiles.json` in the report's folder has them."""
    table = {}
    for found in findings.of("tiles").values():
        if found.get("tiles"):
            key = TileKey(**found["key"])
            table[key] = tuning.KINDS[key.kernel](**found["tiles"])
    tuning.adopt(table)
    files.write_whole(findings.folder / "tiles.json", tuning.text(table))
