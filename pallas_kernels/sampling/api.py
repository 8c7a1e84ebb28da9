"""Sampling with position-keyed noise, from logits or fused with the LM head, and the acceptance of drafts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32, UInt32

from pallas_kernels import dispatch, tuning
from pallas_kernels.dispatch import Implementation
from pallas_kernels.sampling import cpu, reference
from pallas_kernels.sampling.tiles import SampledRows, Softmax, exp_from


class Sample(NamedTuple):
    """What was sampled.

    Attributes:
      token: the token chosen for each row.
      confidence: the largest probability of the softmax of each row's raw logits, in float32: no temperature, noise or
        threshold. 0 where all logits are -inf. None where it was not asked for.
    """

    token: Int32[Array, " R"]
    confidence: Float32[Array, " R"] | None = None


class Accepted(NamedTuple):
    """How far each row's drafts were right.

    Attributes:
      accepted: how many drafts are accepted.
      token: the target's own token after them.
    """

    accepted: Int32[Array, " B"]
    token: Int[Array, " B"]


def accept(drafts: Int[Array, "B drafts"], tokens: Int[Array, "B 1+drafts"]) -> Accepted:
    """Accepts drafts as long as they equal what the target itself would have said.

    tokens[b, i] is the target's token after the last one and i drafts, so draft i is right when it equals tokens[b, i].

    Args:
      drafts: the drafted tokens of each row; -1 is never accepted.
      tokens: the target's own token after the row's last one and after each draft.
    """
    right = (drafts == tokens[:, :-1]) & (drafts >= 0)
    accepted = jnp.cumprod(right.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
    return Accepted(accepted, jnp.take_along_axis(tokens, accepted[:, None], axis=1)[:, 0])


def sample_logits(
    logits: Float[Array, "R V"],
    *,
    seed: UInt32[Array, " R"],
    position: Int[Array, " R"],
    temperature: Float[Array, " R"],
    threshold: Float[Array, " R"] | None = None,
    confidence: bool = False,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> Sample:
    """argmax_v(logits[v] / temperature + gumbel(seed, position, v)) in float32; the lowest index wins ties.

    Args:
      logits: raw; -inf rules a token out, NaN is not allowed.
      seed: the request's seed.
      position: the absolute index of the token that is being sampled.
      temperature: 0 is greedy: the argmax of the logits.
      threshold: tokens with a raw logit below it are ruled out (see `logit_threshold`), except in greedy rows.
      confidence: whether the largest probability of each row is wanted beside its token; static.
      axis_name: None, or inside `shard_map` the mesh axis over which the vocabulary is split: V is then this device's
        share, shares in the order of the axis, and every device returns the winner of all, and the confidence over all.
      implementation: None, "pallas", "xla" or "native" ("mosaic_gpu" for `sample_hidden`); see `dispatch`.
    """
    rows = SampledRows(seed, position, temperature, threshold)
    return _sample(None, logits, rows, None, confidence, axis_name, implementation)


def sample_hidden(
    hidden: Float[Array, "R D"],
    lm_head: Float[Array, "V D"],
    *,
    seed: UInt32[Array, " R"],
    position: Int[Array, " R"],
    temperature: Float[Array, " R"],
    token_ids: Int[Array, " V"] | None = None,
    confidence: bool = False,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> Sample:
    """`sample_logits(hidden @ lm_head.T)`, but the kernel never holds the logits of more than a tile.

    Args:
      hidden: the hidden states after the final norm.
      lm_head: of the dtype of hidden.
      token_ids: the token of each column, for a pruned vocabulary: its noise, and what is returned. Without it a
        column's token is its index.
      seed, position, temperature, confidence, axis_name, implementation: as `sample_logits` has them.
    """
    rows = SampledRows(seed, position, temperature, None)
    return _sample(hidden, lm_head, rows, token_ids, confidence, axis_name, implementation)


def _sample(
    hidden: jax.Array | None,
    x: jax.Array,
    rows: SampledRows,
    token_ids: jax.Array | None,
    confidence: bool,
    axis_name: str | None,
    implementation: Implementation | None,
) -> Sample:
    """Both public forms, x the LM head or the logits: the winner among this device's columns, then among devices."""
    columns = x.shape[1 if hidden is None else 0]
    offset = jnp.int32(0) if axis_name is None else jax.lax.axis_index(axis_name) * columns
    choice = dispatch.why(implementation, no_mosaic_gpu=_no_mosaic_gpu(hidden, x))
    if choice.implementation == "native":
        best = cpu.best(hidden, x, rows, token_ids, offset, confidence=confidence)
    elif choice.implementation == "xla":
        logits = x if hidden is None else reference.lm_head_logits(hidden, x)
        best = reference.best(logits, rows, token_ids, offset, confidence=confidence)
    else:
        size = tuning.pick(tuning.SampleBlocks, choice.body, x.dtype, rows.seed.shape[0])
        keywords = dict(confidence=confidence, blocks=size, interpret=choice.interpret)
        best = _body(choice).best(hidden, x, rows, token_ids, offset, **keywords)
    token = best.column + offset if token_ids is None else token_ids[best.column]
    largest = None if best.softmax is None else _largest_probability(best.softmax, axis_name)
    if axis_name is None:
        return Sample(token, largest)
    # The highest score wins; of equal ones that of the first device, whose columns are lower.
    column, none = best.column + offset, jnp.iinfo(jnp.int32).max
    won = best.score == jax.lax.pmax(best.score, axis_name)
    mine = column == jax.lax.pmin(jnp.where(won, column, none), axis_name)
    return Sample(jax.lax.psum(jnp.where(mine, token, 0), axis_name), largest)


def _no_mosaic_gpu(hidden: jax.Array | None, x: jax.Array) -> str | None:
    """The reason why the Mosaic GPU body cannot take these hidden states and this LM head, None if it can."""
    if hidden is None:
        return "logits are given, and its product with the LM head is what the Mosaic GPU body is for"
    if not hidden.dtype == x.dtype == jnp.bfloat16:
        return dispatch.NOT_BFLOAT16
    D = hidden.shape[1]
    return f"hidden states are {D} wide, no multiple of 64 as the Mosaic GPU body takes them" if D % 64 else None


def _largest_probability(softmax: Softmax, axis_name: str | None) -> Float32[Array, " R"]:
    """The largest probability of each row, over the columns of all devices of the axis."""
    mass = softmax.mass
    if axis_name is not None:
        mass = jax.lax.psum(mass * exp_from(softmax.top, jax.lax.pmax(softmax.top, axis_name)), axis_name)
    return jnp.where(mass > 0, 1 / mass, 0.0)


def _body(choice: dispatch.Choice):
    """The kernel bodies of a platform, imported when first used."""
    if choice.body == "mosaic_gpu":
        from pallas_kernels.sampling import hopper as body
    elif choice.platform == "cuda":
        from pallas_kernels.sampling import gpu as body
    else:
        from pallas_kernels.sampling import tpu as body
    return body
