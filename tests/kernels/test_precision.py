"""float32 is float32 on accelerators: no product of ours leaves its precision to the platform."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import lm_head_logits, lowering_for, matmul
from specformer_jax.config import DraftConfig, SamplingParams, Shape
from specformer_jax.decoding import decode, sampling
from specformer_jax.decoding.state import init_state
from tests import tiny


def float32_products(lowered) -> list[str]:
    found = re.findall(r"stablehlo\.dot_general .*: \(tensor<[\dx]*f32>, .*", lowered.as_text())
    assert found
    return found


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_products_and_their_gradients(platform):
    x, kernel = jnp.ones((4, 16)), jnp.ones((16, 8))
    gradient = jax.grad(lambda x, w: jnp.sin(matmul(x, w)).sum() + jnp.sin(lm_head_logits(x, w.T)).sum(), (0, 1))
    with lowering_for(platform):
        lowered = jax.jit(gradient).trace(x, kernel).lower(lowering_platforms=(platform,))
    for product in float32_products(lowered):
        assert "precision = [HIGHEST, HIGHEST]" in product, product


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_step_of_a_float32_model(unchecked_shapes, platform):  # lowering fills records with what is no array
    model, params = tiny.make(DraftConfig(max_draft_length=3, sequential_ffn=8))
    rows = sampling.stack([SamplingParams(temperature=0.5, top_k=3)] * 2)
    with lowering_for(platform):
        state = init_state(model, Shape(2, 4, 16, 64), rows)
        step = jax.jit(decode.step, static_argnames=("model", "size", "chunk"))
        traced = step.trace(model, params, state, size=12, chunk=8)
        lowered = traced.lower(lowering_platforms=(platform,))
    for product in float32_products(lowered):
        assert "precision = [HIGHEST, HIGHEST]" in product, product
