"""One batch of a job: prompts read together, decoded a few steps a call, looked at between two calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specformer_jax.config import SamplingParams, Shape
from specformer_jax.decoding import decode, sampling
from specformer_jax.decoding.state import BROKEN, DecodeState
from specformer_jax.loading.language_model import LanguageModel

STEPS_PER_CALL = 8  # decode steps on device between two looks at the rows


class Rows(NamedTuple):
    """What the host sees of a batch between two calls: these fields of its `DecodeState`."""

    tokens: np.ndarray
    prompt: np.ndarray
    known: np.ndarray
    done: np.ndarray
    steps: np.ndarray
    accepted: np.ndarray

    def answer(self, row: int) -> list[int]:
        """The tokens of a row's answer so far."""
        return self.tokens[row, self.prompt[row] : self.known[row] - self.is_broken(row)].tolist()

    def is_broken(self, row: int) -> bool:
        """Whether a row has ended because its hidden states were not finite."""
        return bool(self.tokens[row, self.known[row] - 1] == BROKEN)


def run_batch(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    shape: Shape,
    draft_length: int,
) -> Iterator[Rows]:
    """Decodes up to B prompts, and shows their rows when all prompts are read and after every few steps."""
    state = start_batch(lm, prompts, sampling_params, shape, draft_length)
    while True:
        rows = Rows(*jax.device_get(tuple(getattr(state, field) for field in Rows._fields)))
        yield rows
        if rows.done.all():
            return
        state = run_steps(lm, state, STEPS_PER_CALL, shape, draft_length)


def run_steps(lm: LanguageModel, state: DecodeState, steps: int, shape: Shape, draft_length: int) -> DecodeState:
    """A few steps of a batch that `start_batch` made."""
    size = shape.rows * shape.window
    return decode.jit_run(lm.model, lm.params, state, jnp.int32(steps), size=size, draft_length=draft_length)


def start_batch(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    shape: Shape,
    draft_length: int,
) -> DecodeState:
    """Reads up to B prompts: the state that `run_steps` goes on from."""
    tokens = np.zeros((shape.rows, shape.positions), np.int32)
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
        jnp.asarray(np.minimum(sampling_params.max_new_tokens, shape.positions - lengths).astype(np.int32)),
        shape=shape,
        max_new_tokens=shape.positions - 1,
        draft_length=draft_length,
    )
