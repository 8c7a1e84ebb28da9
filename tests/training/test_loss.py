"""The slot-by-slot loss equals the naive one, and its memory does not grow with J."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specformer_jax.training.loss import Teacher, lm_head_loss


def _case(N=24, J=3, D=16, V=50, M=30):
    keys = jax.random.split(jax.random.key(0), 6)
    hidden = jax.random.normal(keys[0], (N, J, D))
    head = jax.random.normal(keys[1], (V, D))
    labels = jax.random.randint(keys[2], (N, J), -1, V)
    weights = jax.random.uniform(keys[3], (N, J)) * (jax.random.uniform(keys[5], (N, J)) > 0.2)
    teacher = Teacher(jax.random.normal(keys[4], (M, D)), jax.random.randint(keys[2], (N, J), 0, M))
    return hidden, head, labels, weights, teacher


def naive_loss(hidden, head, labels, weights, teacher, soft):
    """The specification of `lm_head_loss`'s first output, with all logits at once; arguments the same."""
    log_q = jax.nn.log_softmax(hidden @ head.T)
    cross_entropy = -jnp.take_along_axis(log_q, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    loss = jnp.where(labels >= 0, cross_entropy, 0.0)
    if teacher is not None:
        log_p = jax.nn.log_softmax(teacher.hidden @ head.T)[teacher.positions]
        loss = (1 - soft) * loss + soft * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.sum(weights * loss)


@pytest.mark.parametrize("soft", [0.0, 0.9, 1.0])
def test_gradient_equals_the_naive_loss(soft):
    hidden, head, labels, weights, teacher = _case()
    teacher = teacher if soft else None
    ours = jax.jit(jax.value_and_grad(lambda h: lm_head_loss(h, head, labels, weights, teacher, soft).loss))
    naive = jax.jit(jax.value_and_grad(lambda h: naive_loss(h, head, labels, weights, teacher, soft)))
    loss, gradient = ours(hidden)
    expected, expected_gradient = naive(hidden)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


def test_masked_entries_may_hold_anything_and_metrics_count_the_rest():
    hidden, head, labels, weights, _ = _case()
    hidden = hidden.at[0, 0].set(1e4)
    weights = weights.at[0, 0].set(0.0)
    out = lm_head_loss(hidden, head, labels, weights)
    best = jnp.argmax(jnp.einsum("njd,vd->njv", hidden, head), axis=-1)
    expected = (best == labels) & (weights > 0)
    np.testing.assert_array_equal(out.correct, expected)
    np.testing.assert_array_equal(out.slot_correct, expected.sum(0))
    gradient = jax.grad(lambda h: lm_head_loss(h, head, labels, weights).loss)(hidden)
    assert not np.any(gradient[0, 0])


def test_memory_for_logits_does_not_grow_with_slots():
    N, D, V = 64, 16, 4096

    def temporary(J):
        args = (
            jax.ShapeDtypeStruct((N, J, D), jnp.float32),
            jax.ShapeDtypeStruct((V, D), jnp.float32),
            jax.ShapeDtypeStruct((N, J), jnp.int32),
            jax.ShapeDtypeStruct((N, J), jnp.float32),
        )
        loss = lambda h, *rest: lm_head_loss(h, *rest).loss
        return jax.jit(jax.grad(loss)).lower(*args).compile().memory_analysis().temp_size_in_bytes

    one_slot_of_logits = N * V * 4
    assert temporary(8) - temporary(2) < one_slot_of_logits / 4
