"""Part 3: the same tokens with drafts and without, in float32 on the device; a CPU's tokens beside.

Another device sums in another order, so tokens may part from a CPU's where the two best are close: those are counted.
With drafts and without they must not differ at all.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.accelerator.bench import Bench, Unit
from benchmarks.accelerator.findings import Figures
from benchmarks.accelerator.programs import at_once
from benchmarks.harness import prompts
from benchmarks.lossless import Job, compared, run
from specformer_jax import files
from specformer_jax.batch import generation
from specformer_jax.config import SamplingParams

GOLDEN = Path(__file__).parent.parent / "golden.json"  # a CPU's tokens
ROWS = 8
# Without top-p, which would be another program to compile.
SAMPLED = SamplingParams(temperature=0.8, seed=1234)
WAYS = {"greedy": SamplingParams(), "sampled": SAMPLED}


def units(bench: Bench) -> Iterator[Unit]:
    job = functools.cache(functools.partial(make_job, bench))
    for seconds, (name, sampling_params) in zip((60, 15), WAYS.items(), strict=True):
        yield Unit(name, seconds, functools.partial(compare, bench, job, name, sampling_params))


def make_job(bench: Bench) -> Job:
    """The prompts, and the model that answers them."""
    lm = bench.load("float32")
    conversations = prompts.read_builtin()[: bench.sizes.prompts]
    encoded = [generation.encode_turn(lm, c, [], raw=False) for c in conversations]
    return Job(lm, "float32", encoded, bench.sizes.tokens)


def compare(bench: Bench, job, name: str, sampling_params: SamplingParams) -> Figures:
    """Answers plainly and with drafts, and counts the tokens that differ."""
    answer = answering(job(), name, sampling_params)
    plain, *drafted = at_once([functools.partial(answer, k) for k in bench.sizes.drafts], bench.workers)
    found = compared(drafted, plain)
    if bench.sizes.layers is None and GOLDEN.exists():
        golden = json.loads(GOLDEN.read_text())[name]
        found["beside a CPU"] = compared([plain[: len(golden)]], golden)
    return found


def answering(job: Job, name: str, sampling_params: SamplingParams) -> Callable[[int], list[list[int]]]:
    """The answers' tokens at each k."""
    sampling_params = dataclasses.replace(sampling_params, max_new_tokens=job.tokens)
    return functools.partial(run, job, sampling_params, batch_size=ROWS, name=name)


def write_golden(bench: Bench) -> None:
    """Keeps the tokens of plain decoding here as those of a CPU."""
    job = make_job(bench)
    found = {name: answering(job, name, params)(0) for name, params in WAYS.items()}
    files.write_whole(GOLDEN, json.dumps(found).replace("]], ", "]],\n") + "\n")
