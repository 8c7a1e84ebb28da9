"""Part 5: what a step costs by batch, tokens a row and context: plain decoding beside SpecFormer, and the roofline.

Weights are random and made on the device: a step does the same work whatever they hold, and drafts that are never right
keep every row where it is. `1 + k` tokens a row stand for any budget of that many tokens in all, however it is shared.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.accelerator.bench import Bench, Unit, digits, sentence
from benchmarks.accelerator.findings import Figures
from benchmarks.accelerator.programs import ROUNDS, compile_all
from benchmarks.simulate.replay import Roofline
from specformer_jax.config import DraftConfig, SamplingParams, Shape, TargetConfig
from specformer_jax.decoding import decode, sampling
from specformer_jax.decoding.model import Model, Params
from specformer_jax.decoding.state import DecodeState, init_state, midway
from specformer_jax.drafters.specformer import SpecFormer
from specformer_jax.loading import head_checkpoint
from specformer_jax.loading.weights import boxed_params
from specformer_jax.nn.target import Target

DTYPE = "bfloat16"
DRAFTS = 4
SPREAD = 0.02  # of the random weights


class Step(NamedTuple):
    """A step that is compiled: T = tokens * rows; plain decoding has no head."""

    tokens: int
    plain: bool


@dataclasses.dataclass(frozen=True)
class Timed:
    """A target whose steps are timed, with its head."""

    name: str
    target: TargetConfig
    draft: DraftConfig

    def model(self, step: Step) -> Model:
        """What decodes; no answer ends."""
        endless = dataclasses.replace(self.target, eos_ids=())
        if step.plain:
            return Model(Target(endless, (), DTYPE), truncation=False)
        head = SpecFormer(endless, self.draft, DTYPE)
        return Model(Target(endless, self.draft.hook_layers, DTYPE), head, truncation=False)

    @functools.cached_property
    def shapes(self) -> Params:
        """The shapes of the parameters."""
        boxed = {"target": boxed_params(self.target), "draft": head_checkpoint.boxed_params(self.target, self.draft)}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, DTYPE), nn.unbox(boxed))
        if self.draft.draft_vocab_size is not None:
            size = self.draft.draft_vocab_size, self.target.width
            ids = jax.ShapeDtypeStruct(size[:1], jnp.int32)
            shapes["draft_vocab"] = {"token_ids": ids, "lm_head": jax.ShapeDtypeStruct(size, DTYPE)}
        return shapes

    @functools.cached_property
    def params(self) -> Params:
        """Random parameters, made on the device one after the other."""

        @functools.partial(jax.jit, static_argnums=1)
        def make(key, shape):
            return (jax.random.normal(key, shape) * SPREAD).astype(DTYPE)

        leaves, tree = jax.tree.flatten(self.shapes)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        whole = lambda x: jnp.arange(*x.shape, dtype=x.dtype)
        made = [whole(x) if x.dtype == jnp.int32 else make(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, made)

    def of(self, step: Step, params: Params) -> Params:
        """What a step reads of the parameters, or of their shapes."""
        return {"target": params["target"]} if step.plain else params


def units(bench: Bench) -> Iterator[Unit]:
    for name, (target, draft) in bench.sizes.targets.items():
        timed = Timed(name, target, draft.bind(target))  # its parameters go when the next one's turn has come
        for batch in bench.sizes.batches:
            seconds = 8 + target.layers * 0.7
            yield Unit(f"{name}, batch {batch}", seconds, functools.partial(measure, bench, timed, batch))


def measure(bench: Bench, timed: Timed, rows: int) -> Figures:
    """Compiles all steps of a batch, then times them one after the other at every context that memory holds."""
    contexts, figures = _contexts(bench, timed, rows)
    if not contexts:
        return figures
    asked = [Step(1, True), *(Step(tokens, False) for tokens in bench.sizes.tokens_a_row)]
    positions = max(contexts) + (ROUNDS + 1) * bench.sizes.steps * (1 + DRAFTS) + 8
    shape = Shape(rows, 1 + DRAFTS, 64, positions)
    with bench.lowering():
        lowerings = {step: functools.partial(lower, timed, step, shape) for step in asked}
        compiled = compile_all(lowerings, bench.workers)
        found = []
        for kind in (True, False):  # the two have caches of their own, of which memory need not hold both
            state = None
            for step in (step for step in asked if step.plain == kind):
                program = compiled[step]
                if isinstance(program, Exception):
                    figures["failed_steps"].append(f"{describe(step)}: {sentence(program)}")
                    continue
                state = empty(timed, step, shape) if state is None else state
                for context in contexts:
                    state, taken = time_step(timed, step, program, state, context, bench.sizes.steps)
                    found.append(row(bench, timed, step, rows, context, taken))
            del state
    return figures | {"steps": found}


def _contexts(bench: Bench, timed: Timed, rows: int) -> tuple[list[int], Figures]:
    """The contexts that fit beside the weights, and a line for each that does not."""
    size_of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 2**62)
    fits, figures = [], {"contexts_left_out": {}, "failed_steps": []}
    for context in bench.sizes.contexts:
        t = timed.target
        position = 2 * 2 * t.kv_heads * t.head_size * (t.layers + 1)
        needed = size_of(timed.shapes) + rows * (context + 256) * position
        if needed < 0.93 * limit:
            fits.append(context)
        else:
            reason = f"weights and cache take {needed / 2**30:.1f} of {limit / 2**30:.1f} GiB"
            figures["contexts_left_out"][str(context)] = reason
    return fits, figures


def empty(timed: Timed, step: Step, shape: Shape) -> DecodeState:
    """A batch whose rows wait for their tokens; greedy."""
    window = 1 if step.plain else shape.window
    return init_state(
        timed.model(step), dataclasses.replace(shape, window=window), sampling.stack([SamplingParams()] * shape.rows)
    )


def arguments(timed: Timed, step: Step, shape: Shape) -> tuple[tuple, Figures]:
    """What `decode.jit_run` takes for a step, arrays as their shapes."""
    state = jax.eval_shape(lambda: empty(timed, step, shape))
    arrays = (timed.of(step, timed.shapes), state, jax.ShapeDtypeStruct((), jnp.int32))
    drafts = 0 if step.tokens == 1 else DRAFTS
    return (timed.model(step), *arrays), {"size": shape.rows * step.tokens, "draft_length": drafts}


def lower(timed: Timed, step: Step, shape: Shape) -> jax.stages.Lowered:
    """The program of a few steps, lowered."""
    positional, named = arguments(timed, step, shape)
    return decode.jit_run.lower(*positional, **named)


def time_step(
    timed: Timed, step: Step, program: Any, state: DecodeState, context: int, steps: int
) -> tuple[DecodeState, float]:
    """The seconds of a step of rows with so many positions, and the state to go on with."""
    params, times = timed.of(step, timed.params), []
    for _ in range(1 + ROUNDS):  # the first warms up
        state = jax.block_until_ready(midway(state, context))
        before = int(jax.device_get(state.steps).max())
        begin = time.perf_counter()
        state = jax.block_until_ready(program(params, state, jnp.int32(steps)))
        times.append((time.perf_counter() - begin) / steps)
        done = jax.device_get(state.steps) - before
        if done.min() != steps:
            raise RuntimeError(f"a row took {done.min()} of {steps} steps: its hidden states are not finite")
    return state, sorted(times[1:])[ROUNDS // 2]


def row(bench: Bench, timed: Timed, step: Step, rows: int, context: int, taken: float) -> Figures:
    """One line of the table."""
    roofline = Roofline(bench.ceiling(DTYPE), 1, timed.target, None if step.plain else timed.draft)
    flops, size = roofline.work(rows * step.tokens, rows, rows * context, drafts=step.tokens > 1)
    figures = {"tokens_a_row": step.tokens, "plain": step.plain, "context": context}
    reached = bench.reached(taken, flops, size, DTYPE)
    if reached.pop("share_of_ceiling", None) is not None:
        reached["over_roofline"] = digits(taken / roofline.chip.least_seconds(flops, size))
    return figures | reached


def describe(step: Step) -> str:
    """A step in words."""
    return "plain" if step.plain else f"{step.tokens} tokens a row"
