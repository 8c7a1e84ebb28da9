"""What XLA's CPU backend makes of the decode step: no copies of the cache or the vocabulary, no work done twice."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu, grouped_rms_norm_downsample, lowering_for
from pallas_kernels.product import api
from specformer_jax.config import DraftConfig, SamplingParams, Shape, TargetConfig
from specformer_jax.decoding import decode, sampling
from specformer_jax.decoding.model import Model
from specformer_jax.decoding.state import init_state
from specformer_jax.drafters.specformer import SpecFormer
from specformer_jax.loading import head_checkpoint, weights
from specformer_jax.nn.target import Target
from tests import tiny


def compiled_run(config: TargetConfig, dtype: str, shape: Shape, chunk: int = 0):
    """Eight steps of all rows' drafts and a chunk of prompts, ahead of time, and the abstract state they take."""
    draft = DraftConfig(max_draft_length=shape.window - 1, next_token_hook=True).bind(config)
    model = Model(Target(config, draft.hook_layers, dtype), SpecFormer(config, draft, dtype))
    shapes = {
        "target": weights.abstract_params(config),
        "draft": nn.unbox(head_checkpoint.boxed_params(config, draft)),
    }
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    requests = sampling.stack([SamplingParams()] * shape.rows)
    state = jax.eval_shape(lambda: init_state(model, shape, requests))
    size = shape.rows * shape.window + chunk
    return decode.jit_run.lower(model, params, state, jnp.int32(8), size=size, chunk=chunk).compile(), state


@pytest.mark.parametrize("chunk", [0, 48])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_state_is_updated_in_place(dtype, native, chunk):
    """All of the donated state aliases the result, and no array in the shape of a layer's pages is copied."""
    if native and (reason := cpu.unavailable()):
        pytest.skip(reason)
    with lowering_for("cpu", native=native):
        compiled, state = compiled_run(tiny.CONFIG, dtype, Shape(4, 4, 8, 4096), chunk)
    memory = compiled.memory_analysis()
    everything = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    pages = state.cache[0].k
    assert memory.alias_size_in_bytes >= everything
    if native:  # the reference gathers what the rows' tables name
        assert memory.temp_size_in_bytes < pages.size * pages.dtype.itemsize / 2
    assert pages.dtype == (dtype if native else "float32")
    shape = ",".join(map(str, pages.shape))
    made = [
        line for line in compiled.as_text().splitlines() if re.search(rf"= \w+\[{shape}\]\S* (copy|convert)\(", line)
    ]
    assert not made


def test_no_copy_of_the_vocabulary_is_made():
    """Gathering embeddings reads their rows alone; converting the table took as long as a step, once a call."""
    config = dataclasses.replace(tiny.CONFIG, vocab_size=2**16, width=128, tied_embeddings=True)
    compiled, _ = compiled_run(config, "bfloat16", Shape(1, 3, 8, 32))
    assert compiled.memory_analysis().temp_size_in_bytes < config.vocab_size * config.width * 2 / 2


def test_rotary_angles_are_computed_once_a_pass():
    """However many layers and heads read them."""
    deep = dataclasses.replace(tiny.CONFIG, layers=6)
    counts = {
        config.layers: compiled_run(config, "bfloat16", Shape(1, 3, 8, 32))[0].as_text().count(" cosine(")
        for config in (tiny.CONFIG, deep)
    }
    assert counts[6] == counts[2] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("lead", "inputs", "out"),
    [((1,), 1536, (24,)), ((1,), 1538, (24,)), ((2, 3), 900, (2, 5)), ((2, 3), 769, (2, 5)), ((3, 3), 900, (7,))],
)
def test_wide_products_equal_plain_ones(dtype, lead, inputs, out):
    """A product that is split into parts is the same sum, and has the same gradient."""
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(*lead, inputs)), random.normal(size=(inputs, *out))
    got, gradient = jax.vjp(api.matmul, jnp.asarray(x, dtype), jnp.asarray(kernel, dtype))
    x, kernel = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, kernel))
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype] * np.sqrt(inputs)
    np.testing.assert_allclose(np.asarray(got, np.float64), np.tensordot(x, kernel, 1), rtol=0, atol=tolerance)
    for side in gradient(got):
        assert side.dtype == dtype and bool(jnp.isfinite(side).all())


def test_wide_products_are_split_on_cpu_alone(monkeypatch):
    row = jnp.zeros((1, 1536), jnp.bfloat16)
    assert api._parts(row) == 2 and api._parts(jnp.zeros((1, 1540), jnp.bfloat16)) == 4
    assert api._parts(jnp.zeros((9, 1536), jnp.bfloat16)) == api._parts(row.astype(jnp.float32)) == 1
    # A width without a fitting divisor stays whole.
    assert api._parts(jnp.zeros((1, 769), jnp.bfloat16)) == api._parts(jnp.zeros((1, 1538), jnp.bfloat16)) == 1
    monkeypatch.setattr(api.dispatch, "platform", lambda: "tpu")
    assert api._parts(row) == 1


@pytest.mark.parametrize("rows", [1, 5])
def test_the_downsampler_takes_the_fast_forms(rows):
    """On CPU: no product of one bfloat16 row, and no sum over all the hooks' channels in one."""
    G, D = 4, 576
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, G, D), (G, D), (G, D, D))]
    norm = jax.jit(lambda x, s, k: grouped_rms_norm_downsample(x, s, k, epsilon=1e-5))
    products = [line for line in norm.lower(*operands).compile().as_text().splitlines() if " dot(" in line]
    assert len(products) == 1 and f"f32[3,{max(rows, 2)},{D}]" in products[0]
