"""Sampling with position-keyed noise, from logits or fused with the LM head, and the acceptance of drafts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, tuning
from pallas_kernels.dispatch import Implementation
from pallas_kernels.noise import row_keys
from pallas_kernels.product.api import matmul_rows
from pallas_kernels.sampling.tile import Best, perturb


class Sample(NamedTuple):
    """One token per row.

    Attributes:
      token: i32[R].
      logprob: f32[R], log-softmax of the raw logits (temperature 1, no threshold) at `token`; None if not asked for.
    """

    token: jax.Array
    logprob: jax.Array | None


class Accepted(NamedTuple):
    """How far one window's drafts were right.

    Attributes:
      accepted: i32[B], number of drafts accepted, 0 .. W - 1.
      token: i32[B], the target's own token after them.
    """

    accepted: jax.Array
    token: jax.Array


def accept(drafts: jax.Array, tokens: jax.Array) -> Accepted:
    """Accepts drafts as long as they equal what the target itself would have said.

    tokens[b, i] is the target's token after window index i, so draft i is right when it equals tokens[b, i].

    Args:
      drafts: i32[B, W - 1]; -1 is never accepted.
      tokens: i32[B, W], the target's own tokens.
    """
    right = (drafts == tokens[:, :-1]) & (drafts >= 0)
    accepted = jnp.cumprod(right.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
    return Accepted(accepted, jnp.take_along_axis(tokens, accepted[:, None], axis=1)[:, 0])


def sample_logits(
    logits: jax.Array,
    *,
    seed: jax.Array,
    position: jax.Array,
    temperature: jax.Array,
    threshold: jax.Array | None = None,
    token_ids: jax.Array | None = None,
    with_logprob: bool = False,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> Sample:
    """argmax_v(logits[v] / temperature + gumbel(seed, position, id_v)) in float32; the lowest index wins ties.

    Args:
      logits: f[R, V], raw; -inf rules a token out, NaN is not allowed.
      seed: u32[R], the request's seed.
      position: i32[R], absolute index of the token that is being sampled.
      temperature: f32[R]; 0 is greedy: the argmax of the logits.
      threshold: None or f32[R]; tokens with a raw logit below it are ruled out (see `logit_threshold`), except in
        greedy rows.
      token_ids: None or i32[V], the token of each column (a pruned vocabulary): its noise, and what is returned.
      with_logprob: whether to compute the log-probability too.
      axis_name: None, or inside `shard_map` the mesh axis over which the vocabulary is split: V is then this device's
        share, shares in the order of the axis, and every device returns the winner of all.
      implementation: None, "pallas" or "xla"; see `dispatch`.
    """
    return _sample(
        None, logits, seed, position, temperature, threshold, token_ids, with_logprob, axis_name, implementation
    )


def sample_hidden(
    hidden: jax.Array,
    lm_head: jax.Array,
    *,
    seed: jax.Array,
    position: jax.Array,
    temperature: jax.Array,
    threshold: jax.Array | None = None,
    token_ids: jax.Array | None = None,
    with_logprob: bool = False,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> Sample:
    """`sample_logits(hidden @ lm_head.T)`; the kernel never holds [R, V].

    Args:
      hidden: f[R, D], after the final norm.
      lm_head: f[V, D] of the dtype of hidden.
      The others are those of `sample_logits`.
    """
    return _sample(
        hidden, lm_head, seed, position, temperature, threshold, token_ids, with_logprob, axis_name, implementation
    )


def lm_head_logits(hidden: jax.Array, lm_head: jax.Array) -> jax.Array:
    """f[R, D], f[V, D] -> f32[R, V], accumulated in float32."""
    return matmul_rows(hidden, lm_head)


def best_reference(logits, *, seed, position, temperature, threshold, token_ids, offset, with_logprob) -> Best:
    """The specification in jnp; arguments as `sample_logits`, and the token of column 0 as `offset`."""
    logits = logits.astype(jnp.float32)
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32) + offset if token_ids is None else token_ids
    floor = jnp.full(temperature.shape, -jnp.inf) if threshold is None else threshold

    def noisy():
        first, second = row_keys(seed, position)
        rows = (x[:, None] for x in (first, second, temperature.astype(jnp.float32), floor))
        return _highest(perturb(logits, ids[None, :], *rows))

    # Noise costs more than the argmax.
    score, column = jax.lax.cond(jnp.any(temperature > 0), noisy, lambda: _highest(logits))
    if not with_logprob:
        return Best(score, column, None, None)
    raw = jnp.take_along_axis(logits, column[:, None], axis=1)[:, 0]
    return Best(score, column, raw, jax.nn.logsumexp(logits, axis=1))


def _highest(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The highest value of each row and its first column: f32[R, V] -> f32[R], i32[R]."""
    # Two plain reductions: on CPU they take a tenth of the time of XLA's argmax.
    score = jnp.max(z, axis=1)
    column = jnp.arange(z.shape[1], dtype=jnp.int32)
    return score, jnp.min(jnp.where(z == score[:, None], column, z.shape[1] - 1), axis=1)


def _sample(hidden, x, seed, position, temperature, threshold, token_ids, with_logprob, axis_name, implementation):
    """Both public forms: the winner among this device's columns, then among the devices."""
    V = x.shape[1 if hidden is None else 0]
    offset = jnp.int32(0) if axis_name is None else jax.lax.axis_index(axis_name) * V
    row = dict(seed=seed, position=position, temperature=temperature, threshold=threshold)
    row |= dict(token_ids=token_ids, offset=offset, with_logprob=with_logprob)
    choice = dispatch.why(implementation, no_native=dispatch.NO_NATIVE_BODY)
    if choice.implementation == "xla":
        best = best_reference(x if hidden is None else lm_head_logits(hidden, x), **row)
    else:
        size = tuning.pick(tuning.SampleBlocks, choice.platform, x.dtype, seed.shape[0])
        best = _body(choice).best(hidden, x, **row, blocks=size, interpret=choice.interpret)
    token = best.column + offset if token_ids is None else token_ids[best.column]
    if axis_name is None:
        return Sample(token, best.raw - best.lse if with_logprob else None)
    # The highest score wins; of equal ones that of the first device, whose columns are lower.
    column, none = best.column + offset, jnp.iinfo(jnp.int32).max
    won = best.score == jax.lax.pmax(best.score, axis_name)
    mine = column == jax.lax.pmin(jnp.where(won, column, none), axis_name)
    token = jax.lax.psum(jnp.where(mine, token, 0), axis_name)
    if not with_logprob:
        return Sample(token, None)
    top = jax.lax.pmax(best.lse, axis_name)
    lse = top + jnp.log(jax.lax.psum(jnp.exp(best.lse - top), axis_name))
    return Sample(token, jax.lax.psum(jnp.where(mine, best.raw, 0.0), axis_name) - lse)


def _body(choice: dispatch.Choice):
    """The kernel bodies of a platform, imported when first used."""
    if choice.platform == "cuda":
        from pallas_kernels.sampling import gpu as body
    else:
        from pallas_kernels.sampling import tpu as body
    return body
