"""The device side of the engine: a resident batch of rows, one-row states that read prompts, their compiled steps.

A prompt is read in a one-row state of its own and then inserted into the batch, so reading a prompt never costs the
width of the batch. All of these are pure functions of states; batch sizes come in powers of two, and a batch moves
from one to the next by gathering rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from specformer_jax.config import SamplingParams, Shape
from specformer_jax.decoding import decode, sampling
from specformer_jax.decoding.logprobs import init_logprobs
from specformer_jax.decoding.model import Model, Params
from specformer_jax.decoding.state import DecodeState, init_state
from specformer_jax.nn.sharded_kernels import place_rows


class StepLogprobs(NamedTuple):
    """The log-probabilities of what a call added to each row, in the columns of `StepReport.tokens`; see `Logprobs`.

    Attributes:
      chosen: how likely the target took each new token to be.
      top_ids: the likeliest tokens at its place, best first.
      top_logprobs: how likely the target took these to be.
    """

    chosen: Float32[Array, "B columns"]
    top_ids: Int32[Array, "B columns top"]
    top_logprobs: Float32[Array, "B columns top"]


class StepReport(NamedTuple):
    """What one call added to each row; small, read back while the next call runs.

    Attributes:
      tokens: the new tokens, from column 0 on; what stands after the last of them means nothing.
      from_draft: whether each new token was an accepted draft.
      added: how many new tokens there are.
      done: whether the row is finished.
      steps: how many passes of the target the call made for the row.
      drafted: how many drafts the call verified at each position of a step.
      accepted: how many drafts the call accepted at each position of a step.
    """

    tokens: Int32[Array, "B columns"]
    from_draft: Bool[Array, "B columns"]
    added: Int32[Array, " B"]
    done: Bool[Array, " B"]
    steps: Int32[Array, " B"]
    drafted: Int32[Array, "B J"]
    accepted: Int32[Array, "B J"]


def empty(model: Model, shape: Shape, max_new_tokens: int) -> DecodeState:
    """A batch in which every row is free, and may ask for log-probabilities."""
    state = init_state(
        model, shape, sampling.stack([SamplingParams()] * shape.rows), jnp.zeros(shape.rows, jnp.int32), max_new_tokens
    )
    return place_rows(
        state._replace(logprobs=init_logprobs(shape.rows, max_new_tokens, model.target.config.vocab_size))
    )


def prepare(
    state: DecodeState, sampling_params: SamplingParams, limit: int, draft_cap: int, asks_logprobs: bool
) -> DecodeState:
    """A one-row state about to read a prompt; only small arrays are sent to the device."""

    def one(value, dtype):
        return jax.device_put(np.array([value], dtype))

    assert state.logprobs is not None
    return state._replace(
        sampling=sampling.stack([sampling_params]),
        limit=one(limit, np.int32),
        draft_cap=one(draft_cap, np.int32),
        emitted=one(0, np.int32),
        done=one(True, bool),
        logprobs=state.logprobs._replace(asked=one(asks_logprobs, bool)),
    )


def read_chunk(
    model: Model,
    params: Params,
    state: DecodeState,
    tokens: Int32[Array, "1 T"],
    start: Int32[Array, " 1"],
    ends: Int32[Array, " 1"],
    *,
    width: int,
) -> tuple[DecodeState, StepReport, StepLogprobs]:
    """`decode.prefill` with all the drafts that the drafter has."""
    # The token after a chunk is not known yet: the chunk's last token is read again with it (`Scheduler.read_prompt`).
    unknown = jnp.zeros_like(start)
    after = decode.prefill(model, params, state, tokens, unknown, start, ends, draft_length=model.max_draft_length)
    # A prompt that ends begins the counts anew.
    before = state._replace(steps=jnp.zeros_like(state.steps), drafted=jnp.zeros_like(state.drafted))
    return place_rows(after), *_report(before._replace(accepted=jnp.zeros_like(state.accepted)), after, width)


def advance(
    model: Model,
    params: Params,
    state: DecodeState,
    stop: Bool[Array, " B"],
    steps: Int32[Array, ""],
    *,
    draft_length: int,
    width: int,
) -> tuple[DecodeState, StepReport, StepLogprobs]:
    """A few decode steps of the batch, after the rows of `stop` have been freed."""
    before = state._replace(done=state.done | stop)
    after = decode.run(model, params, before, steps, draft_length=draft_length, window=draft_length + 1)
    return place_rows(after), *_report(before, after, width)


def insert(state: DecodeState, row_state: DecodeState, row: Int32[Array, ""]) -> DecodeState:
    """Puts a one-row state into a row of the batch."""
    return place_rows(jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y[0], row, 0), state, row_state))


def gather(state: DecodeState, rows: Int32[Array, " taken"]) -> DecodeState:
    """The batch that has these rows of another, in this order; a negative number is a free row."""
    taken = jax.tree.map(lambda x: x[jnp.maximum(rows, 0)], state)
    return place_rows(taken._replace(done=taken.done | (rows < 0)))


def copy(state: DecodeState) -> DecodeState:
    """The same state in memory of its own."""
    return place_rows(jax.tree.map(jnp.copy, state))


def _report(before: DecodeState, after: DecodeState, width: int) -> tuple[StepReport, StepLogprobs]:
    columns = jnp.minimum(before.emitted[:, None] + jnp.arange(width), after.output.shape[1] - 1)

    def new(x):
        return jnp.take_along_axis(x, columns.reshape(*columns.shape, *[1] * (x.ndim - 2)), axis=1)

    report = StepReport(
        tokens=new(after.output),
        from_draft=new(after.from_draft),
        added=after.emitted - before.emitted,
        done=after.done,
        steps=after.steps - before.steps,
        drafted=after.drafted - before.drafted,
        accepted=after.accepted - before.accepted,
    )
    assert after.logprobs is not None
    return report, StepLogprobs(
        new(after.logprobs.chosen), new(after.logprobs.top_ids), new(after.logprobs.top_logprobs)
    )


jit_empty = jax.jit(empty, static_argnames=("model", "shape", "max_new_tokens"))
jit_read_chunk = jax.jit(read_chunk, static_argnames=("model", "width"), donate_argnames=("state",))
jit_advance = jax.jit(advance, static_argnames=("model", "draft_length", "width"), donate_argnames=("state",))
jit_insert = jax.jit(insert, donate_argnames=("state",))
jit_gather = jax.jit(gather)
jit_copy = jax.jit(copy)


class CompiledSteps:
    """The compiled functions of one engine, with the sizes they share.

    Attributes:
      model: the model that the functions run.
      params: the arrays of the model.
      sizes: the batch sizes, ascending; the last holds every row.
      chunks: how many prompt tokens a call may read, ascending.
      draft_lengths: the k that are compiled.
      context: the most positions that a row's prompt and answer may take.
      steps: the most decode steps of a call.
      width: the most tokens that a call can add to a row.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        sizes: Sequence[int],
        chunks: Sequence[int],
        draft_lengths: Sequence[int],
        context: int,
        steps: int,
    ):
        self.model, self.params = model, params
        self.sizes, self.chunks, self.draft_lengths = tuple(sizes), tuple(chunks), tuple(draft_lengths)
        self.context, self.steps = context, steps
        self.width = steps * (model.max_draft_length + 1)

    def empty(self, rows: int) -> DecodeState:
        """A batch of free rows."""
        window = self.model.max_draft_length + 1
        shape = Shape(rows, window, self.chunks[-1], self.context + window)
        return jit_empty(self.model, shape, self.context)

    def read_chunk(self, state: DecodeState, tokens: Sequence[int], start: int, last: bool):
        """Reads up to a chunk of a prompt from position `start` on; `last`: the prompt ends with it."""
        chunk = next(size for size in self.chunks if size >= len(tokens))
        padded = np.zeros((1, chunk), np.int32)
        padded[0, : len(tokens)] = tokens
        ends = np.array([len(tokens) - 1 if last else -1], np.int32)
        return jit_read_chunk(
            self.model, self.params, state, padded, np.array([start], np.int32), ends, width=self.width
        )

    def padded(self, count: int) -> int:
        """Tokens that are computed to read so many of a prompt; chunks overlap by one (`Scheduler.read_prompt`).

        With chunks of 32 and 128, 200 tokens are read as 128 and, from the 128th on, 73 padded to 128.
        """
        total, largest = 0, self.chunks[-1]
        while count > largest:
            total, count = total + largest, count - largest + 1
        return total + next(size for size in self.chunks if size >= count)

    def advance(self, state: DecodeState, stop: np.ndarray, steps: int, draft_length: int):
        """A few steps at k = draft_length; returns the state, the report and the log-probabilities."""
        return jit_advance(
            self.model, self.params, state, stop, np.int32(steps), draft_length=draft_length, width=self.width
        )

    def insert(self, state: DecodeState, row_state: DecodeState, row: int) -> DecodeState:
        """Puts a one-row state into a row."""
        return jit_insert(state, row_state, np.int32(row))

    def resize(self, state: DecodeState, rows: Sequence[int], size: int) -> DecodeState:
        """A batch of another size that keeps these rows, at its beginning."""
        padded = np.full(size, -1, np.int32)
        padded[: len(rows)] = rows
        return jit_gather(state, padded)

    def copy(self, state: DecodeState) -> DecodeState:
        """A one-row state that may be written while the original is kept."""
        return jit_copy(state)

    def warm_up(self, log=lambda text: None) -> None:
        """Compiles everything that serving can call, by calling it."""
        row = self.empty(1)
        for chunk in (*self.chunks, *self.chunks):  # on a mesh a row that has been read is laid out for good
            log(f"compiling: prompts in chunks of {chunk}")
            row = prepare(self.copy(row), SamplingParams(), 1, 0, False)
            for _ in range(2):  # a prompt's first chunk, and one that follows it
                row, report, logprobs = self.read_chunk(row, [0] * chunk, 0, True)
            jax.device_get((report, logprobs))
        state = None
        for i, size in enumerate(self.sizes):
            state = self.empty(size) if state is None else self.resize(state, range(self.sizes[i - 1]), size)
            state = self.insert(state, row, 0)
            for k in self.draft_lengths:
                log(f"compiling: {size} rows, {k} drafts")
                state, report, logprobs = self.advance(state, np.zeros(size, bool), 1, k)
                jax.device_get((report, logprobs))
            if i:
                self.resize(state, range(self.sizes[i - 1]), self.sizes[i - 1])
        jax.block_until_ready(state)
