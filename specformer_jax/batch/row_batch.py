"""One batch of a job: prompts read together, decoded a few steps a call, looked at between two calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specformer_jax.config import SamplingParams, Shape
from specformer_jax.decoding import decode, sampling
from specformer_jax.loading.language_model import LanguageModel

STEPS_PER_CALL = 8  # decode steps on device between two looks at the rows


class Rows(NamedTuple):
    """What the host sees of a batch between two calls: these fields of its `DecodeState`."""

    output: np.ndarray
    emitted: np.ndarray
    done: np.ndarray
    steps: np.ndarray
    accepted: np.ndarray


def run_batch(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    shape: Shape,
    draft_length: int,
) -> Iterator[Rows]:
    """Decodes up to B prompts, and shows their rows after the prefill and after every few steps."""
    state = start_batch(lm, prompts, sampling_params, shape, draft_length)
    steps = jnp.int32(STEPS_PER_CALL)
    while True:
        rows = Rows(*jax.device_get(tuple(getattr(state, field) for field in Rows._fields)))
        yield rows
        if rows.done.all():
            return
        state = decode.jit_run(lm.model, lm.params, state, steps, draft_length=draft_length)


def start_batch(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    shape: Shape,
    draft_length: int,
) -> decode.DecodeState:
    """Reads up to B prompts: the state that `decode.jit_run` goes on from."""
    columns = -(-shape.context // shape.chunk) * shape.chunk
    tokens = np.zeros((shape.rows, columns), np.int32)
    lengths = np.zeros(shape.rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    return decode.jit_start(
        lm.model,
        lm.params,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        sampling.stack([sampling_params] * shape.rows),
        # A row near the context's end stops there.
        jnp.asarray(np.minimum(sampling_params.max_new_tokens, shape.context - lengths).astype(np.int32)),
        shape=shape,
        max_new_tokens=shape.new_tokens_bucket(sampling_params.max_new_tokens),
        draft_length=draft_length,
    )
