"""A batch driven from the host one step at a time, as an engine does it: rows are admitted, preempted, given pages."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specformer_jax.config import SamplingParams, Shape
from specformer_jax.decoding import decode, sampling
from specformer_jax.decoding.model import Model
from specformer_jax.decoding.state import DecodeState, init_state

step = jax.jit(decode.step, static_argnames=("model", "size", "chunk", "draft_length"))


def empty(model: Model, rows: int, *, drafts: int, positions: int = 96, pages: int | None = None) -> DecodeState:
    """A batch of free rows that hold so many drafts."""
    shape = Shape(rows, drafts + 1, 8, positions)
    return init_state(model, shape, sampling.stack([SamplingParams()] * rows), pages)


def admit(
    state: DecodeState,
    row: int,
    prompt: Sequence[int],
    request: SamplingParams,
    *,
    answer: Sequence[int] = (),
    arrival: int | None = None,
    pages: Sequence[int] | None = None,
    read: int = 0,
) -> DecodeState:
    """Puts a request into a free row, with what it has already been answered, and the pages that hold `read` tokens."""
    text = [*prompt, *answer]
    tokens = np.zeros(state.tokens.shape[1], np.int32)
    tokens[: len(text)] = text
    new = dict(
        tokens=tokens,
        prompt=len(prompt),
        known=len(text),
        read=read,
        limit=len(prompt) + request.max_new_tokens,
        done=False,
        drafts=-1,
        arrival=row if arrival is None else arrival,
        pages=state.pages[row] if pages is None else np.array(pages, np.int32),
        sampling=jax.tree.map(lambda x: x[0], sampling.stack([request])),
    )
    return state._replace(
        **{name: jax.tree.map(lambda old, x: old.at[row].set(x), getattr(state, name), x) for name, x in new.items()}
    )


def release(state: DecodeState, row: int) -> DecodeState:
    """Frees a row; whatever its pages hold is nobody's."""
    return state._replace(done=state.done.at[row].set(True))


def answer(state: DecodeState, row: int) -> list[int]:
    """The tokens of a row's answer so far."""
    return np.asarray(state.tokens)[row, int(state.prompt[row]) : int(state.known[row])].tolist()


def finish(model: Model, params: dict, state: DecodeState, *, size: int, chunk: int = 0) -> DecodeState:
    """Steps until every row is done."""
    while not bool(jnp.all(state.done)):
        before = state.known.sum() + state.read.sum()
        state = step(model, params, state, size=size, chunk=chunk)
        assert state.known.sum() + state.read.sum() > before, "a step read nothing"
    return state
