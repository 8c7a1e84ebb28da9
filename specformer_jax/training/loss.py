"""The training objective: the LM-head loss slot by slot, so that [N, J, V] logits never exist.

Paper section 3.3 ("intra-batch gradient accumulation"): the logits of one slot at a time; its loss and the gradient
with respect to its hidden states are taken at once, and the logits are dropped before the next slot. The backward pass
then only scales the stored hidden gradient. The LM head is frozen, so it has no gradient.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.product.api import exact

Array = jax.Array


class Teacher(NamedTuple):
    """Soft labels: the target's own distribution, recomputed from its last hidden state.

    Attributes:
      hidden: f[M, D], the target's hidden states after the final norm: the LM head's input.
      rows: i32[N, J], the row of `hidden` whose next-token distribution slot j of anchor n should match.
    """

    hidden: Array
    rows: Array


class SlotLosses(NamedTuple):
    """What `lm_head_loss` returns.

    Attributes:
      loss: f32[], the sum over anchors and slots of weight * loss.
      slot_loss: f32[J], the sum over anchors of valid * loss, without the slot's weight.
      slot_correct: f32[J], how many labels had the largest logit.
      correct: bool[N, J], which.
    """

    loss: Array
    slot_loss: Array
    slot_correct: Array
    correct: Array


def lm_head_loss(
    hidden: Array, lm_head: Array, labels: Array, weights: Array, teacher: Teacher | None = None, soft: float = 0.0
) -> SlotLosses:
    """sum over n, j of weights[n, j] * ((1 - soft) * CE(labels[n, j]) + soft * KL(teacher || q)), one slot at a time.

    q = softmax(hidden @ lm_head.T). Only `hidden` and the first output are differentiated. Memory for logits is one
    slot's [N, V'] (two with a teacher), whatever J is.

    Args:
      hidden: f[N, J, D], after the target's final norm, the compute dtype.
      lm_head: f[V', D], the target's own or its rows of a pruned draft vocabulary.
      labels: i32[N, J], columns of `lm_head`; -1 is a token outside of the pruned vocabulary: it has no
        cross-entropy and counts as wrong.
      weights: f32[N, J]; 0 masks an entry, which may then hold anything finite.
      teacher: soft labels over the same columns; None trains on tokens alone (the paper).
      soft: static, the share of the KL term; read only with a teacher.

    Returns:
      A `SlotLosses`.
    """
    soft = soft if teacher is not None else 0.0
    if teacher is None:
        N, J = labels.shape
        teacher = Teacher(jnp.zeros((1, hidden.shape[-1]), hidden.dtype), jnp.zeros((N, J), jnp.int32))
    return SlotLosses(*_loss(soft, hidden, lm_head, labels, weights, teacher))


def naive_loss(hidden, lm_head, labels, weights, teacher: Teacher | None = None, soft: float = 0.0) -> Array:
    """The specification of `lm_head_loss`'s first output, with all logits at once; arguments the same."""
    log_q = jax.nn.log_softmax(_logits(hidden.reshape(-1, hidden.shape[-1]), lm_head)).reshape(*labels.shape, -1)
    cross_entropy = -jnp.take_along_axis(log_q, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    loss = jnp.where(labels >= 0, cross_entropy, 0.0)
    if teacher is not None:
        log_p = jax.nn.log_softmax(_logits(teacher.hidden, lm_head))[teacher.rows]
        loss = (1 - soft) * loss + soft * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.sum(weights * loss)


def _logits(rows: Array, lm_head: Array) -> Array:
    head = lm_head.astype(rows.dtype)
    return jnp.einsum("nd,vd->nv", rows, head, precision=exact(rows.dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(soft, hidden, lm_head, labels, weights, teacher):
    return _forward(soft, hidden, lm_head, labels, weights, teacher)[0]


def _forward(soft, hidden, lm_head, labels, weights, teacher):
    dtype = hidden.dtype
    if soft:
        # One product for all slots: slot j of anchor t and slot j - 1 of anchor t + 1 share their teacher row.
        log_p = jax.nn.log_softmax(_logits(teacher.hidden, lm_head))
        p = jnp.exp(log_p).astype(dtype)
        entropy = -jnp.sum(p.astype(jnp.float32) * log_p, axis=-1)
    columns = jnp.arange(lm_head.shape[0], dtype=jnp.int32)

    def slot(_, inputs):
        h, label, weight, row = inputs
        logits = _logits(h, lm_head)  # f32[N, V']
        top = jnp.max(logits, axis=-1)
        unnormalised = jnp.exp(logits - top[:, None])
        total = jnp.sum(unnormalised, axis=-1)
        at_label = jnp.take_along_axis(logits, jnp.maximum(label, 0)[:, None], axis=-1)[:, 0]
        hard = (1 - soft) * (label >= 0)
        log_total = top + jnp.log(total)
        loss = hard * (log_total - at_label)
        gradient = (hard + soft)[:, None] * (unnormalised / total[:, None])
        gradient -= jnp.where(columns == label[:, None], hard[:, None], 0.0)
        if soft:
            target = p[row].astype(jnp.float32)
            loss += soft * (log_total - jnp.sum(target * logits, axis=-1) - entropy[row])
            gradient -= soft * target
        gradient = (gradient * weight[:, None]).astype(dtype)
        d_hidden = jnp.einsum(
            "nv,vd->nd", gradient, lm_head.astype(dtype), precision=exact(dtype), preferred_element_type=jnp.float32
        )
        valid = weight > 0
        correct = valid & (label >= 0) & (at_label >= top)
        return None, (jnp.sum(weight * loss), jnp.sum(valid * loss), correct, d_hidden.astype(dtype))

    by_slot = (jnp.swapaxes(hidden, 0, 1), labels.T, weights.T, teacher.rows.T)
    _, (losses, slot_loss, correct, d_hidden) = jax.lax.scan(slot, None, by_slot)
    slot_correct = jnp.sum(correct, axis=1, dtype=jnp.float32)
    return (jnp.sum(losses), slot_loss, slot_correct, correct.T), jnp.swapaxes(d_hidden, 0, 1)


def _backward(soft, d_hidden, cotangents):
    return (cotangents[0] * d_hidden).astype(d_hidden.dtype), None, None, None, None


_loss.defvjp(_forward, _backward)
