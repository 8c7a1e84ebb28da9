"""Part 6: whole answers of the built-in model, plainly, with fixed drafts and as `auto` chooses, by batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from benchmarks import decode
from benchmarks.accelerator.bench import Bench, Unit
from benchmarks.accelerator.findings import Figures
from benchmarks.accelerator.programs import at_once
from benchmarks.harness import contestants, prompts, report
from specformer_jax.config import SamplingParams

# What `auto` runs beside the fixed k, so that it is compiled ahead, too: three drafts for one row, a few that it times
# for more.
AUTO = {True: (3,), False: (0, 1, 2, 4)}


def units(bench: Bench) -> Iterator[Unit]:
    model = functools.cache(functools.partial(bench.load, "bfloat16"))
    for batch in bench.sizes.answered:
        yield Unit(f"batch {batch}", 40, functools.partial(measure, bench, model, batch))


def measure(bench: Bench, model, size: int) -> Figures:
    """Lets all answer the same batches in turn; what they run is compiled side by side before."""
    lm, sampling_params = model(), SamplingParams(max_new_tokens=bench.sizes.answer_tokens)
    encoded = prompts.encode(lm, "builtin")
    batches = [[encoded[(i * size + row) % len(encoded)] for row in range(size)] for i in range(bench.sizes.rounds)]
    make = lambda lengths: decode.ours(lm, lengths, sampling_params, batches, strict=False)
    alone = lambda contestant: "head alone" in contestant.name
    ahead = make(list(dict.fromkeys([*bench.sizes.drafts, *AUTO[size == 1]])))
    at_once([functools.partial(c.run, batches[0]) for c in ahead if not alone(c)], bench.workers)
    taking_part = [c for c in make([*bench.sizes.drafts, None]) if not alone(c)]
    runs = contestants.interleave(taking_part, batches, f"batch {size}")
    return {"contestants": [report.entry(c, size, runs[c.name], runs["plain"], {}) for c in taking_part]}
