"""Speculative decoding as pure functions over a `DecodeState`: prefill, step, run, generate.

Everything here can be jitted and composed by the caller; `generate` is one compiled program without a host round
trip. `draft_length = 0`, or a model without a head, is plain autoregressive decoding through the same code.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import sample_hidden
from specformer_jax import cache as cache_lib
from specformer_jax.config import Shape
from specformer_jax.draft import DraftHead
from specformer_jax.sampling import RowSampling
from specformer_jax.target import Target, lm_head
from specformer_jax.verify import Verdict, choose, verify

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """What is static of a target and its draft head; the arrays live in a `Params` tree beside it.

    Params: {"target": ..., "draft": ..., "draft_vocab": {"token_ids": i32[V'], "lm_head": f[V', D]}}; the last is
    there only for a head with a pruned draft vocabulary, "draft" only for a model with a head.

    Attributes:
      target: the decoder.
      head: the draft head, or None for plain decoding.
      truncation: compile top-k, top-p and min-p in.
      coupled: drafts are chosen with the noise that the target will use, so that they agree more often when
        sampling; False takes their argmax. Neither changes the output.
    """

    target: Target
    head: DraftHead | None = None
    truncation: bool = True
    coupled: bool = True

    @property
    def max_draft_length(self) -> int:
        """J, or 0 without a head."""
        return 0 if self.head is None else self.head.config.max_draft_length

    @property
    def cache_layers(self) -> int:
        """L, and one more for the head's context attention."""
        return self.target.config.layers + (self.head is not None)


class DecodeState(NamedTuple):
    """A batch in flight: each row has its own length, acceptance, sampling and budget.

    Attributes:
      cache: L (+ 1) layers of f[B, K, S, H]; slots below `lengths` are committed.
      lengths: i32[B], committed tokens in the cache: prompt and answer without the last token.
      last_token: i32[B], the token at absolute position `lengths`, not read by the target yet.
      drafts: i32[B, W - 1], forecasts of the tokens after it; -1 is no draft.
      output: i32[B, M], the answer so far.
      emitted: i32[B], how much of `output` is written.
      budget: i32[B], max_new_tokens of each row, at most M.
      done: bool[B], the row is finished or was never filled; the step leaves it as it is.
      sampling: a `RowSampling` of [B].
      steps: i32[B], target passes that decoded for the row (the prefill not counted).
      accepted: i32[B, W - 1], how often the draft at each position was accepted.
    """

    cache: cache_lib.KVCache
    lengths: Array
    last_token: Array
    drafts: Array
    output: Array
    emitted: Array
    budget: Array
    done: Array
    sampling: RowSampling
    steps: Array
    accepted: Array


def init_state(model: Model, shape: Shape, sampling: RowSampling, budget: Array, room: int) -> DecodeState:
    """An empty batch: every row is done until `prefill` fills it.

    Args:
      shape: B, W and S.
      sampling: of each row, [B].
      budget: i32[B], the most tokens to make.
      room: M, columns of the output.
    """
    rows, drafts = shape.rows, shape.window - 1
    config = model.target.config
    zeros = jnp.zeros(rows, jnp.int32)
    return DecodeState(
        cache=cache_lib.create(config, model.cache_layers, rows, shape.slots, model.target.dtype),
        lengths=zeros,
        last_token=zeros,
        drafts=jnp.full((rows, drafts), -1, jnp.int32),
        output=jnp.zeros((rows, room), jnp.int32),
        emitted=zeros,
        budget=jnp.minimum(budget, room),
        done=jnp.ones(rows, bool),
        sampling=sampling,
        steps=zeros,
        accepted=jnp.zeros((rows, drafts), jnp.int32),
    )


def step(model: Model, params: Params, state: DecodeState, *, draft_length: int) -> DecodeState:
    """One target pass: verify the drafts, commit what is right, propose the next chain (DESIGN: one decode step).

    Args:
      model: static.
      params: see `Model`.
      state: donated by the callers below.
      draft_length: static, k; drafts beyond it stay -1.
    """
    start = jnp.where(state.done, -1, state.lengths)
    window = jnp.concatenate([state.last_token[:, None], state.drafts], axis=1)  # [B, W]
    out = _read(model, params, window, start, state.cache)
    verdict = verify(
        out.hidden, state.drafts, state.lengths, lm_head(params["target"]), state.sampling, truncation=model.truncation
    )
    state = state._replace(cache=out.cache + state.cache[len(out.cache) :])
    drafts, cache = _draft(model, params, out.hooks, verdict, start, state, draft_length)
    return _commit(model, state._replace(cache=cache), verdict, drafts)


def prefill(
    model: Model, params: Params, state: DecodeState, tokens: Array, start: Array, ends: Array, *, draft_length: int
) -> DecodeState:
    """Reads one chunk of each row's prompt; where a prompt ends, chooses the first token and proposes drafts.

    Args:
      tokens: i32[B, C], a chunk of the prompts; columns past a prompt's end are ignored.
      start: i32[B], absolute position of tokens[:, 0]; negative rows are left alone (they may be decoding).
      ends: i32[B], the column of the prompt's last token if it lies in this chunk, else -1.
      draft_length: static, k.

    Returns:
      The state with the chunk in the cache; rows whose prompt ended have their first token emitted.
    """
    out = _read(model, params, tokens, start, state.cache)
    cache = out.cache + state.cache[len(out.cache) :]
    column = jnp.maximum(ends, 0)
    finished = ends >= 0
    length = start + column  # where the prompt's last token sits
    first = choose(
        _at(out.hidden, column)[:, 0],
        lm_head(params["target"]),
        length + 1,
        state.sampling,
        truncation=model.truncation,
    ).token

    if model.head is not None:
        following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        _, kv = _context(model, params, out.hooks, following, start, cache[-1])
        cache = (*cache[:-1], kv)
    state = state._replace(cache=cache)
    # The prompt's last position is a window of one token: its draft context is read anew, now that `first` is known.
    verdict = Verdict(jnp.zeros_like(first), first, first[:, None], None)
    last = jnp.where(finished, length, -1)
    drafts, cache = _draft(model, params, _at(out.hooks, column), verdict, last, state, draft_length)

    fresh = state._replace(
        lengths=jnp.where(finished, length, state.lengths),
        emitted=jnp.where(finished, 0, state.emitted),
        done=jnp.where(finished, False, True),
        steps=jnp.where(finished, -1, state.steps),  # the commit below counts one
        accepted=jnp.where(finished[:, None], 0, state.accepted),
    )
    begun = _commit(model, fresh, verdict, drafts)
    return begun._replace(cache=cache, done=jnp.where(finished, begun.done, state.done))


def run(model: Model, params: Params, state: DecodeState, steps: Array, *, draft_length: int) -> DecodeState:
    """Up to `steps` (i32[]) decode steps on device, fewer when every row is done."""

    def unfinished(carry):
        count, state = carry
        return (count < steps) & ~jnp.all(state.done)

    def body(carry):
        count, state = carry
        return count + 1, step(model, params, state, draft_length=draft_length)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def read_prompts(
    model: Model, params: Params, state: DecodeState, prompts: Array, lengths: Array, *, chunk: int, draft_length: int
) -> DecodeState:
    """Fills every row from its prompt, chunk by chunk, as many chunks as the longest prompt needs.

    Args:
      prompts: i32[B, P], P a multiple of `chunk`; columns past a row's length are ignored.
      lengths: i32[B]; 0 leaves the row empty.
      chunk: static, tokens a prefill call reads.
      draft_length: static, k.
    """

    def body(i, state):
        begin = i * chunk
        tokens = jax.lax.dynamic_slice_in_dim(prompts, begin, chunk, axis=1)
        last = lengths - 1 - begin
        start = jnp.where(last >= 0, begin, -1)
        ends = jnp.where((last >= 0) & (last < chunk), last, -1)
        return prefill(model, params, state, tokens, start, ends, draft_length=draft_length)

    return jax.lax.fori_loop(0, (jnp.max(lengths) + chunk - 1) // chunk, body, state)


@functools.partial(jax.jit, static_argnames=("model", "shape", "room", "draft_length"))
def generate(
    model: Model,
    params: Params,
    prompts: Array,
    lengths: Array,
    sampling: RowSampling,
    budget: Array,
    *,
    shape: Shape,
    room: int,
    draft_length: int,
) -> DecodeState:
    """Generates whole answers for a batch in one compiled program.

    Args:
      model: static.
      params: see `Model`.
      prompts: i32[B, P], P a multiple of `shape.chunk`, padded on the right with anything.
      lengths: i32[B], prompt lengths; 0 is an empty row.
      sampling: of each row, [B].
      budget: i32[B], max_new_tokens of each row.
      shape: static; `shape.slots` must hold the longest prompt, `room` tokens and one window.
      room: static, M, columns of the output.
      draft_length: static, k; at most `shape.window - 1` and the head's J.

    Returns:
      The final state: the answers are output[b, :emitted[b]].

    Raises:
      ValueError: shapes that do not fit together.
    """
    check_shape(model, shape, prompts.shape, room, draft_length)
    state = init_state(model, shape, sampling, budget, room)
    state = read_prompts(model, params, state, prompts, lengths, chunk=shape.chunk, draft_length=draft_length)
    return run(model, params, state, jnp.int32(room), draft_length=draft_length)


def check_shape(model: Model, shape: Shape, prompts: tuple[int, ...], room: int, draft_length: int) -> None:
    """Raises ValueError with the rule that a static shape breaks."""
    if prompts[0] != shape.rows or prompts[1] % shape.chunk:
        raise ValueError(f"prompts {prompts} must be [{shape.rows}, a multiple of the chunk {shape.chunk}]")
    if not 0 <= draft_length <= min(shape.window - 1, model.max_draft_length):
        raise ValueError(
            f"draft length {draft_length} is not within 0 and the window's {shape.window - 1} drafts"
            f" or the head's {model.max_draft_length} slots"
        )
    if shape.slots < room + shape.window:
        raise ValueError(f"{shape.slots} cache slots cannot hold {room} new tokens and a window of {shape.window}")


def _at(x: Array, column: Array) -> Array:
    """x f[B, W, ...] at one window index of each row: f[B, 1, ...]."""
    return jnp.take_along_axis(x, column.reshape(-1, 1, *[1] * (x.ndim - 2)), axis=1)


def _read(model: Model, params: Params, tokens: Array, start: Array, cache: cache_lib.KVCache):
    layers = model.target.config.layers
    return model.target.apply({"params": params["target"]}, tokens, start, cache[:layers])


def _context(model, params, hooks, following, start, kv):
    next_embedding = model.target.apply({"params": params["target"]}, following, method="embed")
    return model.head.apply({"params": params["draft"]}, hooks, next_embedding, start, kv, method="context")


def _draft(
    model: Model, params: Params, hooks: Array, verdict: Verdict, start: Array, state: DecodeState, draft_length: int
) -> tuple[Array, cache_lib.KVCache]:
    """Proposes the next chain from the last accepted position of a window.

    Args:
      hooks: f[B, W, G, D], of the window.
      start: i32[B], absolute position of window index 0; negative: empty row.

    Returns:
      drafts i32[B, W' - 1] of the state's width, -1 beyond `draft_length`, and the cache with layer L + 1 written.
    """
    drafts = jnp.full_like(state.drafts, -1)
    if model.head is None:
        return drafts, state.cache
    # The token after window index i is draft i + 1 where that was accepted, else the target's own: tokens[:, i].
    context, kv = _context(model, params, hooks, verdict.tokens, start, state.cache[-1])
    cache = (*state.cache[:-1], kv)
    if draft_length == 0:
        return drafts, cache
    anchor = jnp.where(start < 0, -1, start + verdict.accepted)
    slots = model.head.apply(
        {"params": params["draft"]}, _at(context, verdict.accepted), kv, anchor, method="propose"
    )
    slots = model.target.apply({"params": params["target"]}, slots[:, 0, :draft_length], method="norm")
    rows, count, width = slots.shape
    vocab = params.get("draft_vocab", {})
    sampling = state.sampling.repeat(count)
    sample = sample_hidden(
        slots.reshape(-1, width),
        vocab.get("lm_head", lm_head(params["target"])),
        seed=sampling.seed,
        position=(anchor[:, None] + 2 + jnp.arange(count)).reshape(-1),
        temperature=sampling.temperature if model.coupled else jnp.zeros_like(sampling.temperature),
        token_ids=vocab.get("token_ids"),
    )
    return drafts.at[:, :count].set(sample.token.reshape(rows, count)), cache


def _commit(model: Model, state: DecodeState, verdict: Verdict, drafts: Array) -> DecodeState:
    """Advances lengths, emits the committed tokens up to the end token or the budget, and takes the new drafts."""
    rows, window = verdict.tokens.shape
    index = jnp.arange(window)
    room = state.budget - state.emitted
    ends = jnp.isin(verdict.tokens, jnp.array(model.target.config.eos_ids, jnp.int32))
    committed = jnp.minimum(verdict.accepted + 1, room)
    first_end = jnp.where(ends & (index < committed[:, None]), index, window).min(axis=1)
    committed = jnp.where(state.done, 0, jnp.minimum(committed, first_end + 1))
    keep = index < committed[:, None]

    columns = jnp.where(keep, state.emitted[:, None] + index, state.output.shape[1])
    output = state.output.at[jnp.arange(rows)[:, None], columns].set(verdict.tokens, mode="drop")
    alive = ~state.done
    accepted = state.accepted.at[:, : window - 1].add(keep[:, 1:].astype(jnp.int32))
    emitted = state.emitted + committed
    return state._replace(
        lengths=state.lengths + jnp.where(alive, verdict.accepted + 1, 0),
        last_token=jnp.where(alive, verdict.token, state.last_token),
        drafts=jnp.where(alive[:, None], drafts, state.drafts),
        output=output,
        emitted=emitted,
        done=state.done | (first_end < window) | (emitted >= state.budget),
        steps=state.steps + alive,
        accepted=accepted,
    )
