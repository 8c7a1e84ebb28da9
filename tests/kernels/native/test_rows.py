"""Norm, rotation and gate by the native bodies of a CPU: right, row-invariant, the references for a gradient."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu, grouped_rms_norm_downsample, lowering_for, pack, rms_norm, split_and_rotate, swiglu
from pallas_kernels.norm import reference as norm_reference
from pallas_kernels.rotary import reference as rotary_reference
from pallas_kernels.swiglu import reference as swiglu_reference

if reason := cpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
ROOT = Path(__file__).parents[3]


def norm(x, scale, implementation=None):
    return rms_norm(x, scale, epsilon=1e-5, implementation=implementation)


def normal(*shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def angles(*shape):
    return jnp.cos(normal(*shape, seed=3, dtype=jnp.float32)), jnp.sin(normal(*shape, seed=3, dtype=jnp.float32))


def check_rows(**variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-m", "tests.kernels.native.check_rows"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_instruction_set_agrees_with_float64_and_all_have_the_same_bits():
    outputs = {check_rows(SPECFORMER_CPU_ISA=isa, SPECFORMER_THREADS="3") for isa in cpu.isas()}
    outputs.add(check_rows(SPECFORMER_THREADS="1"))
    assert len(outputs) == 1
    assert int(outputs.pop().split()[0]) > 1_000_000


def test_the_references_agree():
    x, scale = normal(7, 3, 65), normal(65, seed=1)
    np.testing.assert_allclose(
        norm(x, scale).astype(np.float32), norm(x, scale, "xla").astype(np.float32), rtol=2.0**-7, atol=0
    )
    gate_up = normal(9, 3, 2, 65)
    got, expected = swiglu(gate_up), jax.jit(swiglu_reference.swiglu)(gate_up)
    assert got.shape == (9, 3, 65)
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), rtol=2.0**-7, atol=0)
    qkv = normal(9, 3, 2, 5, 10)
    got, expected = (split_and_rotate(qkv, *angles(9, 3, 5), implementation=body) for body in ("native", "xla"))
    assert [x.shape for x in got] == [(9, 3, 6, 10), (9, 3, 2, 10), (9, 3, 2, 10)]
    for heads, others in zip(got, expected, strict=True):
        # The difference of two products may cancel; XLA may fuse one of them.
        np.testing.assert_allclose(heads.astype(np.float32), others.astype(np.float32), rtol=2.0**-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rows_of_several_groups_each_take_their_own_scale(dtype):
    x, scales = normal(50, 3, 65, dtype=dtype), normal(3, 65, seed=1, dtype=dtype)
    got = norm(x, scales, "native")
    for g in range(3):
        np.testing.assert_array_equal(got[:, g], norm(x[:, g], scales[g], "native"))
    np.testing.assert_array_equal(norm(x[7:9], scales, "native"), got[7:9])


def test_the_downsampler_is_native_and_its_tokens_do_not_depend_on_each_other():
    hooks, scales, kernel = normal(50, 4, 40), normal(4, 40, seed=1, dtype=jnp.float32), normal(4, 40, 24, seed=2) / 13
    packed = pack(np.asarray(kernel), axes=2)
    downsample = functools.partial(grouped_rms_norm_downsample, epsilon=1e-5)
    text = jax.jit(downsample).lower(hooks, scales, packed).as_text()
    assert "specformer_rms_norm" in text and "specformer_product" in text
    got, expected = downsample(hooks, scales, packed), downsample(hooks, scales, kernel, implementation="xla")
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), rtol=2.0**-5, atol=2.0**-5)
    np.testing.assert_array_equal(downsample(hooks[7:9], scales, packed), got[7:9])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_under_differentiation_the_reference_runs_bit_for_bit(dtype):
    x, scale, gate_up = normal(4, 40, dtype=dtype), normal(40, seed=1, dtype=jnp.float32), normal(4, 2, 40, dtype=dtype)
    qkv = normal(4, 2, 5, 6, dtype=dtype)
    reference = lambda x, scale: norm_reference.rms_norm(x, scale, epsilon=1e-5)

    def loss(function):
        return lambda *operands: jnp.sin(function(*operands).astype(jnp.float32)).sum()

    def rotated(function):
        return lambda *operands: jnp.concatenate(function(*operands), axis=1)

    native = lambda x, scale: norm(x, scale, "native")
    cases = (
        (native, reference, (x, scale), (0, 1)),
        (native, reference, (x, scale), 0),
        (swiglu, swiglu_reference.swiglu, (gate_up,), 0),
        (rotated(split_and_rotate), rotated(rotary_reference.split_and_rotate), (qkv, *angles(4, 3)), (0, 1, 2)),
    )
    for function, plain, operands, wanted in cases:
        found = jax.jit(jax.value_and_grad(loss(function), wanted))
        assert "specformer" not in found.lower(*operands).as_text()
        expected = jax.jit(jax.value_and_grad(loss(plain), wanted))(*operands)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), found(*operands), expected)
        rematerialised = jax.jit(jax.value_and_grad(jax.checkpoint(loss(function)), wanted))
        assert "specformer" not in rematerialised.lower(*operands).as_text()


def test_which_body_runs():
    text = lambda function, *operands: jax.jit(function).lower(*operands).as_text()
    x, scale, gate_up = normal(4, 40), normal(40, dtype=jnp.float32), normal(4, 2, 40)
    heads = (normal(4, 2, 5, 6), *angles(4, 3))
    assert "specformer_rms_norm" in text(norm, x, scale) and "specformer_swiglu" in text(swiglu, gate_up)
    assert "specformer_rms_norm" in text(lambda x, scale: norm(x, scale, "native"), x.astype(jnp.float32), scale)
    assert "specformer" not in text(norm, x.astype(jnp.float32), scale)
    assert "specformer" not in text(swiglu, gate_up.astype(jnp.float32))
    assert "specformer" not in text(norm, x.astype(jnp.float16), scale)
    assert "specformer_rotary" in text(split_and_rotate, *heads)
    assert "specformer" not in text(split_and_rotate, heads[0].astype(jnp.float32), *heads[1:])
    for context in (lowering_for("cpu", native=False), lowering_for("tpu"), lowering_for("cuda")):
        with context:
            assert "specformer" not in text(norm, x, scale) + text(swiglu, gate_up) + text(split_and_rotate, *heads)
    with pytest.raises(NotImplementedError, match="bfloat16 or float32, not float16"):
        norm(x.astype(jnp.float16), scale, "native")
    with pytest.raises(NotImplementedError, match="gates bfloat16, not float32"):
        swiglu(gate_up.astype(jnp.float32), implementation="native")
    with pytest.raises(NotImplementedError, match="rotates bfloat16, not float32"):
        split_and_rotate(heads[0].astype(jnp.float32), *heads[1:], implementation="native")
    with pytest.raises(NotImplementedError, match="XLA fuses"):
        norm(x, scale, "pallas")


def test_shapes_and_vmap():
    x, scale, gate_up = normal(4, 2, 3, 8), normal(8, seed=1), normal(4, 3, 2, 8)
    assert (jax.vmap(norm, (0, None))(x, scale) == norm(x, scale)).all()
    assert (jax.vmap(swiglu)(gate_up) == swiglu(gate_up)).all()
    assert norm(x[0, 0, 0], scale).shape == (8,) and norm(x[:0], scale).shape == (0, 2, 3, 8)
    assert swiglu(gate_up[0, 0]).shape == (8,) and swiglu(gate_up[:0]).shape == (0, 3, 8)
    heads = (normal(4, 3, 2, 5, 6), *angles(4, 3, 3))
    for mapped, whole in zip(jax.vmap(split_and_rotate)(*heads), split_and_rotate(*heads), strict=True):
        assert (mapped == whole).all()
    assert [len(x) for x in split_and_rotate(*(x[:0] for x in heads))] == [0, 0, 0]
