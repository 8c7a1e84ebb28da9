"""Speculative decoding as pure functions over a `DecodeState`: step, prefill, run, generate.

Everything here can be jitted and composed by the caller; `generate` is one compiled program without a host round
trip. `draft_length = 0`, or a model without a head, is plain autoregressive decoding through the same code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from specformer_jax.config import Shape
from specformer_jax.decoding.logprobs import record_logprobs
from specformer_jax.decoding.model import Model, Params
from specformer_jax.decoding.sampling import RowSampling
from specformer_jax.decoding.state import DecodeState, begin, commit, init_state
from specformer_jax.decoding.verify import Verdict, choose, verify
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn.target import lm_head

Array = jax.Array


def step(
    model: Model, params: Params, state: DecodeState, *, draft_length: int, window: int | None = None
) -> DecodeState:
    """One target pass: verify the drafts, commit what is right, propose the next chain.

    Args:
      model: static.
      params: see `Model`.
      state: a batch in flight.
      draft_length: static, k, at most W - 1; with fewer, the other drafts of the window stay -1.
      window: static, how many tokens the pass reads; None is all W, which keeps one shape at every k (strict).
    """
    start = jnp.where(state.done, -1, state.lengths)
    drafted = state.drafts if window is None else state.drafts[:, : window - 1]
    tokens = jnp.concatenate([state.last_token[:, None], drafted], axis=1)  # [B, W]
    out = model.read(params, tokens, start, state.cache)
    head = lm_head(params["target"])
    verdict = verify(out.hidden, drafted, state.lengths, head, state.sampling, truncation=model.truncation)
    state = state._replace(
        logprobs=record_logprobs(state.logprobs, out.hidden, verdict.tokens, state.emitted, head, ~state.done)
    )
    drafts, cache = draft(model, params, out.hooks, tokens, verdict, start, out.cache, state, draft_length=draft_length)
    return commit(state, verdict, drafts, cache, ~state.done, model.target.config.eos_ids)


def draft(
    model: Model,
    params: Params,
    hooks: Array,
    tokens: Array,
    verdict: Verdict,
    start: Array,
    cache: cache_lib.KVCache,
    state: DecodeState,
    *,
    draft_length: int,
) -> tuple[Array, cache_lib.KVCache]:
    """Proposes the next chain from the last accepted position of a verified window.

    The drafter runs after verification: only then is the token after each position known, and only the accepted
    position needs its draft.

    Args:
      hooks: f[B, W, G, D], of the window.
      tokens: i32[B, W], the window.
      verdict: of the window.
      start: i32[B], absolute position of window index 0; negative: empty row.
      cache: with the target's layers of the window written.
      state: for the sampling parameters and the width of the drafts.
      draft_length: static, k.

    Returns:
      i32[B, W - 1], -1 beyond k, and the cache with the drafter's memory of the window written.
    """
    drafts = jnp.full_like(state.drafts, -1)
    if model.drafter is None:
        return drafts, cache
    context, cache = model.observe(params, hooks, tokens, verdict.tokens, start, cache)
    if draft_length == 0:
        return drafts, cache
    anchor = jnp.where(start < 0, -1, start + verdict.accepted)
    context = at(context, verdict.accepted)[:, None]
    chain = model.draft(params, context, cache, anchor, verdict.token[:, None], state.sampling, draft_length)
    return drafts.at[:, :draft_length].set(chain[:, 0]), cache


def prefill(
    model: Model,
    params: Params,
    state: DecodeState,
    tokens: Array,
    after: Array,
    start: Array,
    ends: Array,
    *,
    draft_length: int,
) -> DecodeState:
    """Reads one chunk of some rows' prompts; where a prompt ends, chooses its first token and proposes drafts.

    Args:
      tokens: i32[B, T], a chunk of the prompts; columns past a prompt's end are ignored.
      after: i32[B], the prompt's token after the chunk, which the drafter reads; anything where the prompt ends in it.
      start: i32[B], absolute position of tokens[:, 0]; negative rows are left alone (they may be decoding).
      ends: i32[B], the column of the prompt's last token if it lies in this chunk, else -1.
      draft_length: static, k.

    Returns:
      The state with the chunk in the cache; rows whose prompt ended have their first token emitted.
    """
    out = model.read(params, tokens, start, state.cache)
    cache = out.cache
    if model.drafter is not None:
        next_tokens = jnp.concatenate([tokens[:, 1:], after[:, None]], axis=1)
        _, cache = model.observe(params, out.hooks, tokens, next_tokens, start, cache)

    ended, column = ends >= 0, jnp.maximum(ends, 0)
    last = start + column  # absolute position of the prompt's last token
    first = choose(
        at(out.hidden, column), lm_head(params["target"]), last + 1, state.sampling, truncation=model.truncation
    ).token
    logprobs = record_logprobs(
        state.logprobs,
        at(out.hidden, column)[:, None],
        first[:, None],
        jnp.zeros_like(first),
        lm_head(params["target"]),
        ended,
    )
    # The last position is a window of one token: its draft context is read again, now that the next token is known.
    verdict = Verdict(jnp.zeros_like(first), first, first[:, None])
    hooks, read = (at(x, column)[:, None] for x in (out.hooks, tokens))
    drafts, cache = draft(
        model, params, hooks, read, verdict, jnp.where(ended, last, -1), cache, state, draft_length=draft_length
    )
    state = begin(state._replace(logprobs=logprobs), ended, last)
    return commit(state, verdict, drafts, cache, ended, model.target.config.eos_ids)


def run(
    model: Model,
    params: Params,
    state: DecodeState,
    steps: Array,
    *,
    draft_length: int,
    window: int | None = None,
) -> DecodeState:
    """Up to `steps` (i32[]) decode steps on device, fewer when every row is done; the rest as `step`."""

    def unfinished(carry):
        count, state = carry
        return (count < steps) & ~jnp.all(state.done)

    def body(carry):
        count, state = carry
        return count + 1, step(model, params, state, draft_length=draft_length, window=window)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def start(
    model: Model,
    params: Params,
    prompts: Array,
    lengths: Array,
    sampling: RowSampling,
    limit: Array,
    *,
    shape: Shape,
    max_new_tokens: int,
    draft_length: int,
) -> DecodeState:
    """Reads a batch of prompts chunk by chunk, as many chunks as the longest needs; arguments as `generate`.

    Raises:
      ValueError: static shapes that do not fit together.
    """
    _check(model, shape, prompts.shape, max_new_tokens, draft_length)
    padded = jnp.pad(prompts, ((0, 0), (0, 1)))  # each chunk is read with the token after it

    def body(i, state):
        offset = i * shape.chunk
        tokens = jax.lax.dynamic_slice_in_dim(padded, offset, shape.chunk + 1, axis=1)
        last = lengths - 1 - offset
        here = jnp.where(last >= 0, offset, -1)
        ends = jnp.where((last >= 0) & (last < shape.chunk), last, -1)
        return prefill(model, params, state, tokens[:, :-1], tokens[:, -1], here, ends, draft_length=draft_length)

    chunks = (jnp.max(lengths) + shape.chunk - 1) // shape.chunk
    return jax.lax.fori_loop(0, chunks, body, init_state(model, shape, sampling, limit, max_new_tokens))


def generate(
    model: Model,
    params: Params,
    prompts: Array,
    lengths: Array,
    sampling: RowSampling,
    limit: Array,
    *,
    shape: Shape,
    max_new_tokens: int,
    draft_length: int,
) -> DecodeState:
    """Generates whole answers for a batch; `jit_generate` is this with every static argument named.

    Args:
      model: static.
      params: see `Model`.
      prompts: i32[B, P], P a multiple of `shape.chunk`; columns past a row's length may hold anything.
      lengths: i32[B], prompt lengths; 0 is an empty row.
      sampling: of each row, [B] (`sampling.stack`).
      limit: i32[B], the most tokens of each row's answer, at most M.
      shape: static; `shape.positions` must hold the longest prompt, the most new tokens and one window.
      max_new_tokens: static, M, columns of the output.
      draft_length: static, k; at most `shape.window - 1` and the head's J.

    Returns:
      The final state: the answers are output[b, :emitted[b]].

    Raises:
      ValueError: static shapes that do not fit together.
    """
    state = start(
        model,
        params,
        prompts,
        lengths,
        sampling,
        limit,
        shape=shape,
        max_new_tokens=max_new_tokens,
        draft_length=draft_length,
    )
    return run(model, params, state, jnp.int32(max_new_tokens), draft_length=draft_length)


jit_start = jax.jit(start, static_argnames=("model", "shape", "max_new_tokens", "draft_length"))
jit_run = jax.jit(run, static_argnames=("model", "draft_length"), donate_argnames=("state",))
jit_generate = jax.jit(generate, static_argnames=("model", "shape", "max_new_tokens", "draft_length"))


def at(x: Array, column: Array) -> Array:
    """x f[B, W, ...] at one window index of each row, i32[B]: f[B, ...]."""
    return jnp.take_along_axis(x, column.reshape(-1, 1, *[1] * (x.ndim - 2)), axis=1)[:, 0]


def _check(model: Model, shape: Shape, prompts: tuple[int, ...], max_new_tokens: int, draft_length: int) -> None:
    """Raises ValueError with the rule that a static shape breaks."""
    if prompts[0] != shape.rows or prompts[1] % shape.chunk:
        raise ValueError(f"prompts {prompts} must be [{shape.rows}, a multiple of the chunk {shape.chunk}]")
    if not 0 <= draft_length <= min(shape.window - 1, model.max_draft_length):
        raise ValueError(
            f"draft length {draft_length} is not within 0 and the window's {shape.window - 1} drafts"
            f" or the head's {model.max_draft_length} slots"
        )
    if shape.positions < max_new_tokens + shape.window:
        raise ValueError(
            f"{shape.positions} positions cannot hold {max_new_tokens} new tokens and a window of {shape.window}"
        )
