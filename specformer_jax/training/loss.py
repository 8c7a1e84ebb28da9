"""The training objective: the LM-head loss slot by slot, so that logits of all slots together never exist.

Paper section 3.3 ("intra-batch gradient accumulation"): the logits of one slot at a time; its loss and the gradient
with respect to its hidden states are taken at once, and the logits are dropped before the next slot. The backward pass
then only scales the stored hidden gradient. The LM head is frozen, so it has no gradient.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.product.api import exact


class Teacher(NamedTuple):
    """Soft labels: the target's own distribution, recomputed from its last hidden state.

    Attributes:
      hidden: the target's last hidden states after the final norm, at all positions: the LM head's input.
      positions: the position in `hidden` whose next-token distribution each slot of each anchor should match.
    """

    hidden: Float[Array, "positions D"]
    positions: Int[Array, "anchors J"]


class SlotLosses(NamedTuple):
    """What `lm_head_loss` returns.

    Attributes:
      loss: the sum over anchors and slots of weight * loss.
      slot_loss: the sum over anchors of each slot's loss where its weight is not 0, without that weight.
      slot_correct: how many labels of each slot had the largest logit.
      correct: which labels had the largest logit.
    """

    loss: Float[Array, ""]
    slot_loss: Float[Array, " J"]
    slot_correct: Float[Array, " J"]
    correct: Bool[Array, "anchors J"]


def lm_head_loss(
    hidden: Float[Array, "anchors J D"],
    lm_head: Float[Array, "columns D"],
    labels: Int[Array, "anchors J"],
    weights: Float[Array, "anchors J"],
    teacher: Teacher | None = None,
    soft: float = 0.0,
) -> SlotLosses:
    """sum over a, j of weights[a, j] * ((1 - soft) * CE(labels[a, j]) + soft * KL(teacher || q)), one slot at a time.

    q = softmax(hidden @ lm_head.T). Only `hidden` and the first output are differentiated. Memory for logits is that of
    one slot (of two with a teacher), whatever J is.

    Args:
      hidden: the slots of the anchors of all rows, after the norm that the LM head follows, in the compute dtype.
      lm_head: the target's LM head (then its columns are all V tokens), or its rows of a pruned draft vocabulary.
      labels: the column that each slot should forecast; -1 is a token outside of the pruned vocabulary: it has no
        cross-entropy and counts as wrong.
      weights: what each entry weighs; 0 masks an entry, which may then hold anything finite.
      teacher: soft labels over the same columns; None trains on tokens alone (the paper).
      soft: the share of the KL term, static; read only with a teacher.
    """
    soft = soft if teacher is not None else 0.0
    if teacher is None:
        teacher = Teacher(jnp.zeros((1, hidden.shape[-1]), hidden.dtype), jnp.zeros(labels.shape, jnp.int32))
    return SlotLosses(*_loss(soft, hidden, lm_head, labels, weights, teacher))


def _logits(hidden: Float[Array, "states D"], lm_head: Float[Array, "columns D"]) -> Float[Array, "states columns"]:
    head = lm_head.astype(hidden.dtype)
    return jnp.einsum("ad,vd->av", hidden, head, precision=exact(hidden.dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(soft, hidden, lm_head, labels, weights, teacher):
    return _forward(soft, hidden, lm_head, labels, weights, teacher)[0]


def _forward(soft, hidden, lm_head, labels, weights, teacher):
    dtype = hidden.dtype
    if soft:
        # One product for all slots: slot j of anchor t and slot j - 1 of anchor t + 1 share their teacher position.
        log_p = jax.nn.log_softmax(_logits(teacher.hidden, lm_head))
        p = jnp.exp(log_p).astype(dtype)
        entropy = -jnp.sum(p.astype(jnp.float32) * log_p, axis=-1)
    columns = jnp.arange(lm_head.shape[0], dtype=jnp.int32)

    def slot(_, inputs):
        h, label, weight, position = inputs
        logits = _logits(h, lm_head)
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
            target = p[position].astype(jnp.float32)
            loss += soft * (log_total - jnp.sum(target * logits, axis=-1) - entropy[position])
            gradient -= soft * target
        gradient = (gradient * weight[:, None]).astype(dtype)
        d_hidden = jnp.einsum(
            "av,vd->ad", gradient, lm_head.astype(dtype), precision=exact(dtype), preferred_element_type=jnp.float32
        )
        valid = weight > 0
        correct = valid & (label >= 0) & (at_label >= top)
        return None, (jnp.sum(weight * loss), jnp.sum(valid * loss), correct, d_hidden.astype(dtype))

    by_slot = (jnp.swapaxes(hidden, 0, 1), labels.T, weights.T, teacher.positions.T)
    _, (losses, slot_loss, correct, d_hidden) = jax.lax.scan(slot, None, by_slot)
    slot_correct = jnp.sum(correct, axis=1, dtype=jnp.float32)
    return (jnp.sum(losses), slot_loss, slot_correct, correct.T), jnp.swapaxes(d_hidden, 0, 1)


def _backward(soft, d_hidden, cotangents):
    return (cotangents[0] * d_hidden).astype(d_hidden.dtype), None, None, None, None


_loss.defvjp(_forward, _backward)
