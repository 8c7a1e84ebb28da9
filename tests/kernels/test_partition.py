"""Kernels split over a mesh of four simulated devices give what one device gives, gradients too."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from pallas_kernels import *

rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def both(name, f, *operands):
    one = jax.jit(lambda *o: f("xla", *o))(*operands)
    with partitioned(mesh, rows="data", heads="model", vocab="model", columns="model"):
        many = jax.jit(lambda *o: f("pallas", *o))(*operands)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one, many)
    print(name, "ok")

def gradients(loss):
    return lambda implementation, *o: jax.value_and_grad(lambda o: jnp.sum(jnp.sin(loss(implementation, *o))))(o)

B, T, J, N, K, H, S, V, D = 4, 3, 2, 4, 2, 8, 16, 64, 8
start = jnp.array([0, 5, -1, 9])
both("attention", gradients(lambda i, q, k, v, dk, dv: mixed_mask_attention(
    q, (k, v), (dk, dv), start=start, implementation=i)),
    normal(B, T, J, N, H), normal(B, K, S, H), normal(B, K, S, H), normal(B, T, J, K, H), normal(B, T, J, K, H))
both("norm", gradients(lambda i, x, s, k: grouped_rms_norm_downsample(x, s, k, epsilon=1e-5, implementation=i)),
    normal(B, T, 4, D), normal(4, D), normal(4, D, 8))
row = dict(seed=jnp.arange(B, dtype=jnp.uint32), position=jnp.arange(B), temperature=jnp.array([0.0, 1.0, 0.5, 0.0]))
logits = jnp.asarray(rng.integers(0, 3, (B, V)), jnp.float32)
both("logits", lambda i, x: sample_logits(x, **row, with_logprob=True, implementation=i), logits)
both("hidden", lambda i, h, w: sample_hidden(h, w, **row, with_logprob=True, implementation=i),
    jnp.asarray(rng.integers(-1, 2, (B, D)), jnp.float32), jnp.asarray(rng.integers(-1, 2, (V, D)), jnp.float32))
ids = jnp.arange(V, dtype=jnp.int32) * 3
both("mapped", lambda i, x: sample_logits(x, **row, token_ids=ids, implementation=i).token, logits)
"""


@pytest.mark.slow
def test_kernels_on_a_mesh():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("ok") == 5
