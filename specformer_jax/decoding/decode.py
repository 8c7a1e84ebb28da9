"""Speculative decoding as pure functions over a `DecodeState`: step, run, generate.

Every call of the target reads a flat batch of tokens, whoever's they are: prompts, last tokens, drafts. Everything here
can be jitted and composed by the caller; `generate` is one compiled program without a host round trip.
`draft_length = 0`, or a model without a drafter, is plain autoregressive decoding through the same code.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from specformer_jax.config import Shape
from specformer_jax.decoding.allocate import allocate
from specformer_jax.decoding.flat import Flat
from specformer_jax.decoding.logprobs import record_logprobs, record_prompt_logprobs
from specformer_jax.decoding.model import Model, Params
from specformer_jax.decoding.sampling import RowSampling
from specformer_jax.decoding.state import DecodeState, init_state
from specformer_jax.decoding.verify import Verdict, commit, verify
from specformer_jax.nn.sharded_kernels import row_shards
from specformer_jax.nn.target import lm_head


def step(
    model: Model, params: Params, state: DecodeState, *, size: int, chunk: int = 0, draft_length: int | None = None
) -> DecodeState:
    """One target pass over `size` tokens: verify the drafts among them, commit what is right, propose the next ones.

    Args:
      model: static.
      params: see `Model`.
      state: a batch in flight.
      size: static, T, how many tokens the pass reads; as many as active rows at least. With as many, it is plain
        decoding; what is more goes to prompts and to the drafts that are likeliest to be right (`allocate`).
      chunk: static, the most tokens of prompts among them; 0 reads none.
      draft_length: static, how many drafts to propose for each row; None proposes as many as the state holds.
    """
    head = lm_head(params["target"])
    flat = allocate(state, size, chunk=chunk)
    out = model.read(params, flat.token, flat.places, state.cache)
    verdict = verify(out.hidden, flat, state, head, truncation=model.truncation, verification=model.verification)
    logprobs = record_logprobs(state.logprobs, out.hidden, flat, verdict.tokens, state.known, head)
    if chunk:
        logprobs = record_prompt_logprobs(logprobs, out.hidden, flat, state.tokens, state.prompt, head)
    state = commit(state._replace(logprobs=logprobs), flat, verdict, model.target.config.eos_ids)
    context, cache = model.observe(params, out.hooks, flat.following(state.tokens), flat.places, out.cache)
    return propose(model, params, state._replace(cache=cache), flat, verdict, context, draft_length=draft_length)


def propose(
    model: Model,
    params: Params,
    state: DecodeState,
    flat: Flat,
    verdict: Verdict,
    context: Float[Array, "T _"],
    *,
    draft_length: int | None = None,
) -> DecodeState:
    """Proposes the next chain of every row that asked, from its last accepted place.

    The drafter runs after verification: only then is the token after each place known, and only the accepted place
    needs its drafts. Where none takes any it does not run; on a CPU it runs for about as many rows as do, elsewhere few
    take as long as many.

    Args:
      model: static.
      params: see `Model`.
      state: with the pass committed.
      flat: the batch that the pass read.
      verdict: what verification decided about it.
      context: the drafter's reading of the batch.
      draft_length: as in `step`.
    """
    columns, most = state.drafts.shape[1], len(flat.seats)
    count = min(columns if draft_length is None else draft_length, model.max_draft_length)
    if count == 0:
        return state
    wants = flat.asks & ~flat.seated(state.done) & (flat.seated(state.draft_cap) > 0)
    few = dispatch.platform() == "cpu" and row_shards() == 1  # rows that a mesh splits stay where their pages are
    sizes = sorted({1, -(-most // 4), most}) if few else [most]
    first = jnp.argsort(~wants, stable=True) if len(sizes) > 1 else jnp.arange(most)

    def drafted(some: int):
        seats = first[:some]
        anchor, wanted = (flat.last + verdict.accepted)[seats], wants[seats]
        rows = jnp.where(wanted, flat.seats[seats], len(state.known))
        chain = model.draft(
            params,
            context[anchor][:, None],
            state.cache,
            jnp.where(wanted, flat.places.position[anchor], -1),
            verdict.token[seats, None],
            state.tokens.at[rows].get(mode="fill", fill_value=0),
            state.sampling.at(rows),
            count,
            flat.places.table[seats],
        )
        into = lambda old, new: old.at[rows, :count].set(new[:, 0], mode="drop")
        return jax.tree.map(into, before, tuple(chain))

    before = state.drafts, state.confidence, state.drawn_from
    none = lambda: before
    enough = jnp.searchsorted(jnp.array([0, *sizes]), wants.sum())
    after = jax.lax.switch(enough, [none, *[functools.partial(drafted, some) for some in sizes]])
    return state._replace(**dict(zip(("drafts", "confidence", "drawn_from"), after, strict=True)))


def run(
    model: Model,
    params: Params,
    state: DecodeState,
    steps: Int32[Array, ""],
    *,
    size: int,
    chunk: int = 0,
    draft_length: int | None = None,
) -> DecodeState:
    """Up to `steps` steps on device, fewer when every row is done; the other arguments are those of `step`."""

    def unfinished(carry):
        count, state = carry
        return (count < steps) & ~jnp.all(state.done)

    def body(carry):
        count, state = carry
        return count + 1, step(model, params, state, size=size, chunk=chunk, draft_length=draft_length)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def read_prompts(
    model: Model, params: Params, state: DecodeState, *, size: int, draft_length: int | None = None
) -> DecodeState:
    """Large steps until every row has the first token of its answer; rows that have it wait for the others.

    They wait so that each token of an answer but the first comes from the same program, whatever prompts are beside it.
    """

    def body(state: DecodeState) -> DecodeState:
        reading = state.reading
        waiting = state._replace(done=~reading)
        after = step(model, params, waiting, size=size, chunk=size, draft_length=draft_length)
        return after._replace(done=jnp.where(reading, after.done, state.done))

    return jax.lax.while_loop(lambda state: jnp.any(state.reading), body, state)


def start(
    model: Model,
    params: Params,
    prompts: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
    sampling: RowSampling,
    limit: Int32[Array, " B"],
    *,
    shape: Shape,
    max_new_tokens: int,
    draft_length: int,
) -> DecodeState:
    """Reads a batch of prompts, and stops where every row has its first token; arguments as `generate`.

    Raises:
      ValueError: static shapes that do not fit together.
    """
    _check(model, shape, prompts.shape, max_new_tokens, draft_length)
    state = init_state(model, shape, sampling)
    state = state._replace(
        tokens=state.tokens.at[:, : prompts.shape[1]].set(prompts),
        prompt=lengths,
        known=lengths,
        limit=lengths + jnp.minimum(limit, max_new_tokens),
        done=lengths == 0,
        draft_cap=jnp.full_like(state.draft_cap, draft_length),
    )
    return read_prompts(model, params, state, size=shape.rows * shape.chunk, draft_length=draft_length)


def generate(
    model: Model,
    params: Params,
    prompts: Int32[Array, "B T"],
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
      prompts: token ids, padded on the right; what lies past a row's length is ignored.
      lengths: how many tokens each prompt has; 0 is an empty row.
      sampling: how each row is sampled (`sampling.stack`).
      limit: the most tokens of each row's answer.
      shape: static; `shape.positions` must hold each row's prompt and answer.
      max_new_tokens: static, the most tokens of any answer.
      draft_length: static, k, the most drafts of a row; at most `shape.window - 1` and the head's J.

    Returns:
      The final state: the answers are tokens[b, lengths[b] : known[b]].

    Raises:
      ValueError: static shapes that do not fit together.
    """
    begin = functools.partial(start, shape=shape, max_new_tokens=max_new_tokens, draft_length=draft_length)
    state = begin(model, params, prompts, lengths, sampling, limit)
    steps, size = jnp.int32(max_new_tokens), shape.rows * shape.window
    return run(model, params, state, steps, size=size, draft_length=draft_length)


jit_start = jax.jit(start, static_argnames=("model", "shape", "max_new_tokens", "draft_length"))
jit_run = jax.jit(run, static_argnames=("model", "size", "chunk", "draft_length"), donate_argnames=("state",))
jit_generate = jax.jit(generate, static_argnames=("model", "shape", "max_new_tokens", "draft_length"))


def _check(model: Model, shape: Shape, prompts: tuple[int, ...], max_new_tokens: int, draft_length: int) -> None:
    """Raises ValueError with the rule that a static shape breaks."""
    if prompts[0] != shape.rows or prompts[1] > shape.positions:
        raise ValueError(f"prompts {prompts} must be [{shape.rows}, {shape.positions} at most]")
    if not 0 <= draft_length <= min(shape.window - 1, model.max_draft_length):
        raise ValueError(
            f"draft length {draft_length} is not within 0 and the window's {shape.window - 1} drafts"
            f" or the head's {model.max_draft_length} slots"
        )
    if shape.positions <= max_new_tokens:
        raise ValueError(f"{shape.positions} positions cannot hold a prompt and {max_new_tokens} new tokens")
