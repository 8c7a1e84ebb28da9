"""Speculative decoding as pure functions over a `DecodeState`: step, prefill, run, generate.

Everything here can be jitted and composed by the caller; `generate` is one compiled program without a host round
trip. `draft_length = 0`, or a model without a drafter, is plain autoregressive decoding through the same code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from specformer_jax.config import Shape
from specformer_jax.decoding.logprobs import record_logprobs
from specformer_jax.decoding.model import Cache, Model, Params
from specformer_jax.decoding.sampling import RowSampling
from specformer_jax.decoding.state import DecodeState, begin, commit, init_state
from specformer_jax.decoding.verify import Verdict, choose, verify
from specformer_jax.nn.target import lm_head


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
    hooks: Float[Array, "B W G D"],
    tokens: Int32[Array, "B W"],
    verdict: Verdict,
    start: Int32[Array, " B"],
    cache: Cache,
    state: DecodeState,
    *,
    draft_length: int,
) -> tuple[Int32[Array, "B _"], Cache]:
    """Proposes the next chain from the last accepted position of a verified window.

    The drafter runs after verification: only then is the token after each position known, and only the accepted
    position needs its draft.

    Args:
      model: static.
      params: see `Model`.
      hooks: the target's hidden states of the window at the hook layers.
      tokens: the window.
      verdict: what verification decided about the window.
      start: the absolute position of window index 0; negative marks an empty row.
      cache: with the target's layers of the window written.
      state: tells how rows are sampled, and how wide the drafts are.
      draft_length: static, k.

    Returns:
      As many drafts as the state holds, -1 beyond k, and the cache with the drafter's memory of the window written.
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
    tokens: Int32[Array, "B T"],
    after: Int32[Array, " B"],
    start: Int32[Array, " B"],
    ends: Int32[Array, " B"],
    *,
    draft_length: int,
) -> DecodeState:
    """Reads one chunk of some rows' prompts; where a prompt ends, chooses its first token and proposes drafts.

    Args:
      model: static.
      params: see `Model`.
      state: a batch in flight.
      tokens: a chunk of the prompts; columns past a prompt's end are ignored.
      after: the prompt's token after the chunk, which the drafter reads; anything where the prompt ends in it.
      start: the absolute position of tokens[:, 0]; negative rows are left alone (they may be decoding).
      ends: the column of the prompt's last token if it lies in this chunk, else -1.
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
    hidden, hooks, read = (at(x, column)[:, None] for x in (out.hidden, out.hooks, tokens))
    head = lm_head(params["target"])
    first = choose(hidden[:, 0], head, last + 1, state.sampling, truncation=model.truncation).token
    # The last position is a window of one token: its draft context is read again, now that the next token is known.
    verdict = Verdict(jnp.zeros_like(first), first, first[:, None])
    state = state._replace(
        logprobs=record_logprobs(state.logprobs, hidden, verdict.tokens, jnp.zeros_like(first), head, ended)
    )
    drafts, cache = draft(
        model, params, hooks, read, verdict, jnp.where(ended, last, -1), cache, state, draft_length=draft_length
    )
    return commit(begin(state, ended, last), verdict, drafts, cache, ended, model.target.config.eos_ids)


def run(
    model: Model,
    params: Params,
    state: DecodeState,
    steps: Int32[Array, ""],
    *,
    draft_length: int,
    window: int | None = None,
) -> DecodeState:
    """Up to `steps` decode steps on device, fewer when every row is done; the other arguments are those of `step`."""

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
    prompts: Int32[Array, "B P"],
    lengths: Int32[Array, " B"],
    sampling: RowSampling,
    limit: Int32[Array, " B"],
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
    prompts: Int32[Array, "B P"],
    lengths: Int32[Array, " B"],
    sampling: RowSampling,
    limit: Int32[Array, " B"],
    *,
    shape: Shape,
    max_new_tokens: int,
    draft_length: int,
) -> DecodeState:
    """Generates whole answers for a batch; `jit_generate` is this with every static argument named.

    Args:
      model: static.
      params: see `Model`.
      prompts: token ids, padded on the right to a multiple of `shape.chunk`; what lies past a row's length is ignored.
      lengths: how many tokens each prompt has; 0 is an empty row.
      sampling: how each row is sampled (`sampling.stack`).
      limit: the most tokens of each row's answer, at most M.
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


def at(x: Shaped[Array, "B W ..."], column: Int32[Array, " B"]) -> Shaped[Array, "B ..."]:
    """What x holds at one window index of each row."""
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
