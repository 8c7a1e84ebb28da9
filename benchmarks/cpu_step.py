"""Plain decoding against transformers, native steps against XLA's, speculative ones against plain, in turns.

    python -m benchmarks.cpu_step [--json FILE]

bfloat16, the built-in target. The contestants take turns, A B C D A B C D: transformers' `generate` (where torch is
installed) and this project's plain decoding answer one prompt; a plain step and one at k = 4 are timed on a row in the
middle of its context, a plain step of 16 rows, and the reading of a prompt of 512 tokens, each natively (where the
bodies were built) and with XLA alone. The medians of the ratios are printed; the times alone say little on a shared
machine.
The cost of a step does not depend on how good the drafts are: a head that accepts nothing serves as well as a trained
one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks.harness import contestants, machine
from specformer_jax.batch import auto_draft_length, generation
from specformer_jax.config import SamplingParams, Shape
from specformer_jax.decoding import decode, sampling
from specformer_jax.decoding.model import Model
from specformer_jax.loading import fetch
from specformer_jax.loading.language_model import LanguageModel, load
from specformer_jax.nn.target import Target

PROMPT = "Explain in a few sentences why the sky is blue and why the evening sky is red."
TOKENS = 64
DRAFT_LENGTH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    lm = load(dtype="bfloat16", lookup=False)  # a step whose drafts are looked up costs less
    prompt = generation.encode_prompt(lm, [PROMPT], raw=False)
    taking_part = {"plain": plain_generate(lm, prompt)} | of_one_model(lm)
    if pallas_kernels.why().implementation == "native":
        with xla_alone():
            reference = of_one_model(load(dtype="bfloat16", lookup=False))
        taking_part |= {f"{name}, XLA": xla_alone()(run) for name, run in reference.items()}
    if (transformers := transformers_generate(prompt)) is not None:
        taking_part["transformers"] = transformers
    for run in taking_part.values():
        run()  # compiles, warms up
    times: dict[str, list[float]] = {name: [] for name in taking_part}
    for _ in range(options.rounds):
        for name, run in taking_part.items():
            begin = time.perf_counter()
            run()
            count = 1 if name.startswith("prompt") else TOKENS
            times[name].append((time.perf_counter() - begin) / count * 1e3)
    result: dict[str, Any] = {"ms": {name: round(statistics.median(t), 2) for name, t in times.items()}, "ratios": {}}
    result["machine"] = machine.measure("bfloat16")
    read = sum(x.nbytes for x in jax.tree.leaves(lm.params["target"])) / statistics.median(times["plain step"]) * 1e3
    result["plain step's share of the copy bandwidth"] = round(read / result["machine"]["copy_gbytes"] / 1e9, 3)
    for name, over, under in (
        ("plain decoding / transformers generate, time per token", "plain", "transformers"),
        ("step with k = 4 / plain step", "k = 4 step", "plain step"),
        ("plain step / plain step with XLA alone", "plain step", "plain step, XLA"),
        ("step with k = 4 / step with k = 4 with XLA alone", "k = 4 step", "k = 4 step, XLA"),
        ("plain step of 16 rows / the same with XLA alone", "plain step of 16", "plain step of 16, XLA"),
        ("prompt of 512 tokens / the same with XLA alone", "prompt of 512", "prompt of 512, XLA"),
    ):
        if over in times and under in times:
            pairs = zip(times[over], times[under], strict=True)
            result["ratios"][name] = round(statistics.median(a / b for a, b in pairs), 3)
    print(json.dumps(result, indent=2))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=2)
            file.write("\n")


def xla_alone():
    """Where no native body runs."""
    return pallas_kernels.lowering_for("cpu", native=False)


def of_one_model(lm: LanguageModel) -> dict[str, Callable[[], None]]:
    """What is timed natively and with XLA alone."""
    return {
        "plain step": step(lm, 0),
        "k = 4 step": step(lm, DRAFT_LENGTH),
        "plain step of 16": step(lm, 0, rows=16),
        "prompt of 512": read_prompt(lm, 512),
    }


def read_prompt(lm: LanguageModel, length: int) -> Callable[[], None]:
    """A prompt of so many tokens read for plain decoding, up to the first token of its answer."""
    shape = Shape(1, 1, length, length + 2)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 1000, (1, length)), jnp.int32)
    arguments = (tokens, jnp.array([length]), sampling.stack([SamplingParams()]), jnp.array([1]))
    model = Model(Target(lm.config, (), "bfloat16"))
    how = dict(shape=shape, max_new_tokens=1, draft_length=0)
    return lambda: jax.block_until_ready(decode.jit_start(model, lm.params, *arguments, **how).tokens)


def plain_generate(lm: LanguageModel, prompt: list[int]) -> Callable[[], None]:
    """TOKENS new tokens of plain decoding, the prompt included, as one call."""
    endless = dataclasses.replace(lm.config, eos_ids=())
    model = Model(Target(endless, (), "bfloat16"))
    shape = generation.job_shape([len(prompt)], TOKENS, batch_size=1, window=1, context=endless.context)
    tokens = np.array([prompt], np.int32)
    arguments = (jnp.asarray(tokens), jnp.array([len(prompt)]), sampling.stack([SamplingParams()]), jnp.array([TOKENS]))
    return lambda: jax.block_until_ready(
        decode.jit_generate(model, lm.params, *arguments, shape=shape, max_new_tokens=TOKENS, draft_length=0).tokens
    )


def step(lm: LanguageModel, k: int, rows: int = 1) -> Callable[[], None]:
    """TOKENS decode steps on rows that never end, with a head of the shipped size for k > 0."""
    lm = lm.in_window(k + 1)
    endless = lm.model.target.clone(config=dataclasses.replace(lm.config, eos_ids=()))
    model, params = dataclasses.replace(lm.model, target=endless), lm.params
    if k:
        # Random weights: drafts that are never right, so that every step does the same work.
        random = np.random.default_rng(0)
        draw = lambda x: jnp.asarray(random.normal(size=x.shape) * 0.02, x.dtype)
        params = params | {"draft": jax.tree.map(draw, params["draft"])}
    shape = Shape(rows, k + 1, 64, 256)

    def run():
        state = jax.block_until_ready(auto_draft_length.running(model, shape, SamplingParams()))
        state = decode.jit_run(model, params, state, jnp.int32(TOKENS), size=rows * (k + 1), draft_length=k)
        jax.block_until_ready(state.tokens)

    return run


def transformers_generate(prompt: list[int]) -> Callable[[], None] | None:
    """transformers' greedy `generate` in bfloat16, or None where torch is not installed."""
    try:
        import torch

        model = contestants.load_transformers(fetch.BUILTIN, "bfloat16")
    except ImportError:
        print("torch and transformers are not installed: that contestant is left out", file=sys.stderr)
        return None
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)

    def run():
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=mask, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=2
            )

    return run


if __name__ == "__main__":
    main()
