"""Grouped RMS norm + downsample: the bodies (interpreted) against the reference, and that against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import grouped_rms_norm_downsample, lowering_for, tuning

SMALL = tuning.NormBlocks(rows=16, columns=128, depth=16)


def _operands(seed, rows, D, columns, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    scale = 1 + 0.1 * normal(4, D).astype(jnp.float32)
    return normal(*rows, 4, D), scale, normal(4, D, columns) * jnp.asarray(D**-0.5, dtype)


def _gradients(implementation):
    def loss(*operands):
        out = grouped_rms_norm_downsample(*operands, epsilon=1e-5, implementation=implementation)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def test_reference_is_the_formula():
    x, scale, kernel = (np.asarray(a, np.float64) for a in _operands(0, (2, 3), 8, 5))
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    expected = np.einsum("btgd,gdc->btc", normed, kernel)
    out = grouped_rms_norm_downsample(*_operands(0, (2, 3), 8, 5), epsilon=1e-5)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
    ("rows", "D", "columns", "dtype"),
    [((37,), 24, 200, jnp.float32), pytest.param((5, 7), 64, 64, jnp.bfloat16, marks=pytest.mark.slow)],
)
def test_bodies(platform, rows, D, columns, dtype):
    operands = _operands(1, rows, D, columns, dtype)
    expected = _gradients("xla")(*operands)
    with lowering_for(platform, interpret=True), tuning.using(SMALL):
        actual = _gradients("pallas")(*operands)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * max(1.0, np.abs(e).max()))


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_gradient_of_float32_masters_is_not_rounded_to_the_compute_dtype(platform):
    hooks, scale, _ = _operands(3, (18,), 16, 32, jnp.bfloat16)
    masters = _operands(3, (18,), 16, 32)[2]
    with lowering_for(platform, interpret=True), tuning.using(SMALL):
        (_, out), (d_hooks, _, d_kernel) = _gradients(None)(hooks, scale, masters)
    assert (out.dtype, d_hooks.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert (d_kernel != d_kernel.astype(jnp.bfloat16)).mean() > 0.5


def test_no_race_in_simulated_tpu_memory():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    operands = _operands(2, (20,), 16, 130)
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with lowering_for("tpu"), tuning.using(SMALL), pltpu.force_tpu_interpret_mode(params):
        (_, out), gradients = jax.block_until_ready(_gradients("pallas")(*operands))
    assert not simulator.races.races_found
    (_, expected), expected_gradients = _gradients("xla")(*operands)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4), gradients, expected_gradients)


def test_shapes_that_do_not_fit(unchecked_shapes):
    with pytest.raises(ValueError, match="must share"):
        grouped_rms_norm_downsample(jnp.zeros((2, 4, 8)), jnp.zeros((3, 8)), jnp.zeros((4, 8, 5)), epsilon=1e-6)
