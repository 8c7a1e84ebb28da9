"""Several chains a row, as n copies of it: each copy drafts on its own, one of them goes on as all."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import gumbel
from specformer_jax.config import SamplingParams, Shape, bucket
from specformer_jax.decoding import sampling
from specformer_jax.decoding.allocate import allocate
from specformer_jax.decoding.decode import propose
from specformer_jax.decoding.model import Model, Params
from specformer_jax.decoding.pass_counts import PassCounts
from specformer_jax.decoding.state import DecodeState, init_state
from specformer_jax.decoding.verification import noise
from specformer_jax.decoding.verification.kind import BLOCK, Verification
from specformer_jax.decoding.verification.several import verify_several
from specformer_jax.decoding.verify import Asked, Verdict, commit, processed_logits
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.nn.target import lm_head


def count_passes(
    lm: LanguageModel, encoded: Sequence[Sequence[int]], sampling_params: SamplingParams, *, k: int, n: int
) -> PassCounts:
    """The passes of answers whose drafts are n chains a row."""
    lm = lm.sampling_with(sampling_params)
    model = dataclasses.replace(lm.model, verification=Verification(BLOCK))
    longest = bucket(max(map(len, encoded)), 64)
    shape = Shape(n, k + 1, longest, longest + bucket(sampling_params.max_new_tokens) + 2 * (k + 1))
    counts = PassCounts(k)
    for number, prompt in enumerate(encoded):
        seeds = [sampling_params.seed + number * n + copy for copy in range(n)]
        rows = sampling.stack([dataclasses.replace(sampling_params, seed=seed) for seed in seeds])
        state = read_prompt(model, lm.params, shape, rows, prompt)
        end = len(prompt) + sampling_params.max_new_tokens
        while not bool(state.done[0]) and int(state.known[0]) < end:
            state = several_pass(model, lm.params, state, size=n * (k + 1), chunk=0)
        committed = int(state.known[0]) - len(prompt) - 1  # without the first token, which comes of reading the prompt
        counts.add(committed, int(state.steps[0]), np.asarray(state.accepted[0]))
    return counts


def read_prompt(
    model: Model, params: Params, shape: Shape, rows: sampling.RowSampling, prompt: Sequence[int]
) -> DecodeState:
    """Copies of one row, with the first token of its answer, and drafts of their own.

    Args:
      shape: a row for each copy, and a chunk that holds the prompt.
      rows: how each copy is sampled: by seeds of their own.
    """
    state = init_state(model, shape, rows)
    state = state._replace(
        tokens=state.tokens.at[:, : len(prompt)].set(jnp.array(prompt, jnp.int32)),
        prompt=jnp.full(shape.rows, len(prompt), jnp.int32),
        known=jnp.full(shape.rows, len(prompt), jnp.int32),
        limit=jnp.full(shape.rows, shape.positions, jnp.int32),
        done=jnp.zeros(shape.rows, bool),
    )
    size = shape.rows * shape.chunk
    return several_pass(model, params, state, size=size, chunk=size)


@functools.partial(jax.jit, static_argnames=("model", "size", "chunk"), donate_argnames="state")
def several_pass(model: Model, params: Params, state: DecodeState, *, size: int, chunk: int) -> DecodeState:
    """`decode.step` of n copies of a row: verified together, they go on as the copy whose chain was accepted."""
    n, width = len(state.known), state.drafts.shape[1] + 1
    flat = allocate(state, size, chunk=chunk)
    out = model.read(params, flat.token, flat.places, state.cache)
    asked = Asked.of(flat.asking(width).reshape(-1), flat, state)
    head = lm_head(params["target"])
    logits, threshold = processed_logits(out.hidden[asked.place], asked, flat, state, head, truncation=model.truncation)
    target = sampling.distribution(logits, asked.sampling.temperature, threshold).reshape(n, width, -1)
    drafts = flat.token[asked.place].reshape(n, width)[:, 1:]
    seed, begin = state.sampling.seed, state.known
    slots = noise.slot_positions(begin[:, None], jnp.arange(1, width))
    uniforms = noise.uniform(noise.stream(seed, noise.ACCEPTANCE)[:, None], slots)
    rest = gumbel(noise.stream(seed[0], noise.REST), begin[0], jnp.arange(target.shape[-1]))
    found = verify_several(state.drawn_from, target, drafts, flat.drafts[0], uniforms, rest)

    index = jnp.arange(width)
    tokens = jnp.where(index < found.accepted, jnp.append(drafts[found.chain], 0), found.token)
    verdict = Verdict(*(jnp.broadcast_to(x, (n, *x.shape)) for x in (found.accepted, found.token, tokens)))
    share = lambda x: jnp.broadcast_to(x.reshape(n, -1, *x.shape[1:])[found.chain], (n, len(x) // n, *x.shape[1:]))
    copied = lambda x: share(x).reshape(x.shape)
    hooks, cache = out.hooks, out.cache
    if not chunk:  # each copy has read the same of a prompt, and drafts of its own
        layers = model.target.config.layers
        hooks, cache = copied(hooks), (*jax.tree.map(copied, cache[:layers]), *cache[layers:])
    state = commit(state, flat, verdict, model.target.config.eos_ids)
    context, cache = model.observe(params, hooks, flat.following(state.tokens), flat.places, cache)
    return propose(model, params, state._replace(cache=cache), flat, verdict, context)
