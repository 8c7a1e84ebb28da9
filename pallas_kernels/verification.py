"""Sampling with position-keyed noise, from logits or fused with the LM head, and the acceptance of drafts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.noise import gumbel


class Sample(NamedTuple):
    """One token per row.

    Attributes:
      token: i32[R].
      logprob: f32[R], log-softmax of the raw logits (temperature 1, no threshold) at `token`; None if not asked for.
    """

    token: jax.Array
    logprob: jax.Array | None


class Verdict(NamedTuple):
    """What one verification pass decided.

    Attributes:
      accepted: i32[B], number of drafts accepted, 0 .. W - 1.
      token: i32[B], the target's own token after them.
    """

    accepted: jax.Array
    token: jax.Array


def accept(drafts: jax.Array, tokens: jax.Array) -> Verdict:
    """Accepts drafts as long as they equal what the target itself would have said.

    tokens[b, i] is the target's token after window index i, so draft i is right when it equals tokens[b, i].

    Args:
      drafts: i32[B, W - 1]; -1 is never accepted.
      tokens: i32[B, W], the target's own tokens.
    """
    right = (drafts == tokens[:, :-1]) & (drafts >= 0)
    accepted = jnp.cumprod(right.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
    return Verdict(accepted, jnp.take_along_axis(tokens, accepted[:, None], axis=1)[:, 0])


def sample_logits(
    logits: jax.Array,
    *,
    seed: jax.Array,
    position: jax.Array,
    temperature: jax.Array,
    threshold: jax.Array | None = None,
    token_ids: jax.Array | None = None,
    with_logprob: bool = False,
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
      implementation: None, "pallas" or "xla"; see `dispatch`.
    """
    dispatch.why(implementation, unsupported="the kernel is not written yet")
    return logits_reference(
        logits,
        seed=seed,
        position=position,
        temperature=temperature,
        threshold=threshold,
        token_ids=token_ids,
        with_logprob=with_logprob,
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
    implementation: Implementation | None = None,
) -> Sample:
    """`sample_logits(hidden @ lm_head.T)`; the kernel never holds [R, V].

    Args:
      hidden: f[R, D], after the final norm.
      lm_head: f[V, D].
      The others are those of `sample_logits`.
    """
    dispatch.why(implementation, unsupported="the kernel is not written yet")
    return logits_reference(
        lm_head_logits(hidden, lm_head),
        seed=seed,
        position=position,
        temperature=temperature,
        threshold=threshold,
        token_ids=token_ids,
        with_logprob=with_logprob,
    )


def lm_head_logits(hidden: jax.Array, lm_head: jax.Array) -> jax.Array:
    """f[R, D], f[V, D] -> f32[R, V], accumulated in float32."""
    R = hidden.shape[0]
    if R == 1:  # XLA's CPU product of one bfloat16 row takes a slow path, of two rows a fast one
        hidden = jnp.concatenate([hidden, hidden])
    logits = jnp.einsum("rd,vd->rv", hidden, lm_head, preferred_element_type=jnp.float32)
    return logits[:R]


def logits_reference(logits, *, seed, position, temperature, threshold, token_ids, with_logprob) -> Sample:
    """The specification in jnp; arguments as `sample_logits`."""
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32) if token_ids is None else token_ids
    logits = logits.astype(jnp.float32)
    temperature = temperature.astype(jnp.float32)[:, None]

    def noisy():
        z = logits / jnp.where(temperature > 0, temperature, 1.0)
        z = z + gumbel(seed[:, None], position[:, None], ids[None, :])
        if threshold is not None:
            z = jnp.where(logits >= threshold[:, None], z, -jnp.inf)
        z = jnp.where(temperature > 0, z, logits)
        return jnp.argmax(z, axis=1).astype(jnp.int32)

    def greedy():
        return jnp.argmax(logits, axis=1).astype(jnp.int32)

    column = jax.lax.cond(jnp.any(temperature > 0), noisy, greedy)  # noise costs more than the argmax
    logprob = None
    if with_logprob:
        chosen = jnp.take_along_axis(logits, column[:, None], axis=1)[:, 0]
        logprob = chosen - jax.nn.logsumexp(logits, axis=1)
    return Sample(ids[column], logprob)
