"""Weights that stay in the four bits of their file give the bits of the bfloat16 weights that they stand for."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import PackedMatrix, cpu, matmul, pack_four_bits, packs_four_bits, unpack
from pallas_kernels.product import four_bits
from specformer_jax.loading import packing, weights
from specformer_jax.loading.target_config import read_config
from specformer_jax.nn.target import Target
from tests.kernels.native.check import random_blocks
from tests.loading.gguf_files import write_gguf

if reason := cpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
Q = gguf.GGMLQuantizationType


def is_packed(x) -> bool:
    return isinstance(x, PackedMatrix)


def in_four_bits(x) -> bool:
    return is_packed(x) and x.panels.dtype == jnp.uint8


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_what_comes_out_is_what_dequantising_and_casting_gives(count, columns, seed):
    blocks = random_blocks(np.random.default_rng(seed), count, columns)
    stored = np.ascontiguousarray(blocks.T).view(np.uint8)
    wanted = gguf.dequantize(stored, Q.Q4_1).T.astype(jnp.bfloat16)
    kernel = pack_four_bits(blocks)
    assert kernel.shape == wanted.shape == (32 * count, columns)
    assert kernel.panels.shape == (-(-columns // 16), count, 320)
    assert (np.asarray(unpack(kernel)).view(np.uint16) == wanted.view(np.uint16)).all()


def test_several_input_axes_end_in_the_blocks():
    blocks = random_blocks(np.random.default_rng(0), 6, 10)
    kernel = pack_four_bits(blocks.reshape(3, 2, 5, 2), axes=2)
    assert kernel.shape == (3, 64, 5, 2)
    flat = unpack(pack_four_bits(blocks))
    assert (unpack(kernel) == flat.reshape(kernel.shape)).all()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 192)), jnp.bfloat16)
    got = matmul(x.reshape(2, 3, 64), kernel, axes=2)
    assert (got.reshape(2, 10) == matmul(x, pack_four_bits(blocks))).all()


@pytest.fixture
def quickly(monkeypatch):
    """As on a CPU whose set gains by it."""
    monkeypatch.setattr(weights, "packs_four_bits", lambda: True)


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1])
def test_a_file_in_four_bits_stays_so_where_it_is_multiplied(kind, tmp_path, tiny_target, quickly):
    file = write_gguf(tiny_target, tmp_path / "model.gguf", kind)
    config = read_config(file)
    kept = weights.load_params(file, config, "bfloat16", pack=True)
    plain = weights.load_params(file, config, "bfloat16")
    layer = kept["layer_0"]
    assert in_four_bits(layer["ffn"]["gate_up"]) and in_four_bits(layer["ffn"]["down"])
    assert in_four_bits(layer["attention"]["qkv"]["kernel"]) and not is_packed(kept["embedding"])
    again = packing.unpack_tree(kept)
    assert jax.tree.structure(again) == jax.tree.structure(plain)
    jax.tree.map(np.testing.assert_array_equal, again, plain)


def test_the_model_computes_the_same_bits(tmp_path, tiny_target, quickly, monkeypatch):
    file = write_gguf(tiny_target, tmp_path / "model.gguf", Q.Q4_1)
    config = read_config(file)
    target = Target(config, (0, config.layers), "bfloat16")
    tokens = jnp.arange(1, 12)[None]
    run = jax.jit(lambda params: target.apply({"params": params}, tokens).hooks)
    got = run(weights.load_params(file, config, "bfloat16", pack=True))
    monkeypatch.setattr(weights, "packs_four_bits", lambda: False)
    params = weights.load_params(file, config, "bfloat16", pack=True)
    assert not any(map(in_four_bits, jax.tree.leaves(params, is_leaf=is_packed)))
    assert (np.asarray(got).view(np.uint16) == np.asarray(run(params)).view(np.uint16)).all()


def test_scales_that_are_no_numbers_are_read_as_ever(tmp_path, tiny_target, quickly):
    config = read_config(tiny_target)
    blocks = np.zeros((config.width, config.ffn // 32), four_bits.BLOCK)
    blocks["scale"][3], blocks["q"] = np.inf, 0x11
    raw = {"blk.0.ffn_down.weight": (blocks.view(np.uint8), Q.Q4_1)}
    file = write_gguf(tiny_target, tmp_path / "model.gguf", Q.Q4_1, blocks=raw)
    params = weights.load_params(file, read_config(file), "bfloat16", pack=True)
    assert not in_four_bits(params["layer_0"]["ffn"]["down"]) and in_four_bits(params["layer_1"]["ffn"]["down"])


def test_only_the_set_that_was_measured_to_gain_keeps_four_bits(monkeypatch):
    for isa in ("amx_bf16", "avx512_bf16", "avx512", "avx2", "plain"):
        monkeypatch.setattr(cpu, "isa", lambda isa=isa: isa)
        assert packs_four_bits() == (isa == "avx512_bf16")
