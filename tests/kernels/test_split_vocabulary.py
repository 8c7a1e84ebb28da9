"""A vocabulary split over four simulated devices gives the tokens and confidence of one device, ties included."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from pallas_kernels import sample_hidden, sample_logits
from specformer_jax.nn import sharded_kernels
from specformer_jax.nn.mesh import make_mesh

rng = np.random.default_rng(0)
R, V, D = 64, 512, 8
mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
integers = lambda *shape: jnp.asarray(rng.integers(-1, 2, shape), jnp.float32)  # ties everywhere
rows = dict(seed=jnp.arange(R, dtype=jnp.uint32), position=jnp.arange(R), temperature=jnp.arange(R) % 3 * 0.5)
ids = jnp.arange(V, dtype=jnp.int32) * 3

def check(name, one, split, specs, *operands):
    spread = lambda implementation: jax.jit(jax.shard_map(
        lambda *o: split(implementation, *o), mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))
    expected = one(*operands)
    for implementation in ("xla", "pallas"):
        agree(spread(implementation)(*operands), expected)
    print(name, "ok")

def agree(actual, expected):
    np.testing.assert_array_equal(actual.token, expected.token)
    np.testing.assert_allclose(actual.confidence, expected.confidence, rtol=1e-6)

def lopsided(*shape):  # the first device's columns hold nothing, in the last row no device's do
    return integers(*shape).at[:, : V // 4].set(-jnp.inf).at[-1].set(-jnp.inf)

without, rows = rows, dict(rows, confidence=True)
over = dict(rows, axis_name="model")
check("logits", lambda x: sample_logits(x, **rows), lambda i, x: sample_logits(x, **over, implementation=i),
      (P(None, "model"),), integers(R, V))
check("lopsided", lambda x: sample_logits(x, **rows), lambda i, x: sample_logits(x, **over, implementation=i),
      (P(None, "model"),), lopsided(R, V))
check("hidden", lambda h, w: sample_hidden(h, w, **rows),
      lambda i, h, w: sample_hidden(h, w, **over, implementation=i),
      (P(), P("model", None)), integers(R, D), integers(V, D))
check("mapped", lambda h, w, t: sample_hidden(h, w, token_ids=t, **rows),
      lambda i, h, w, t: sample_hidden(h, w, token_ids=t, **over, implementation=i),
      (P(), P("model", None), P("model")), integers(R, D), integers(V, D), ids)

# As the model calls them: rows are split too, and the confidence is handed on where it is asked for.
hidden, head = integers(R, D), integers(V, D)
expected = sample_hidden(hidden, head, token_ids=ids, **rows)
expected_of_logits = sample_logits(hidden @ head.T, **rows)
with jax.set_mesh(make_mesh(data=2, model=2)):
    agree(jax.jit(lambda h, w: sharded_kernels.sample_hidden(h, w, token_ids=ids, **rows))(hidden, head), expected)
    agree(jax.jit(lambda x: sharded_kernels.sample_logits(x, **rows))(hidden @ head.T), expected_of_logits)
    plain = jax.jit(lambda h, w: sharded_kernels.sample_hidden(h, w, token_ids=ids, **without))(hidden, head)
np.testing.assert_array_equal(plain.token, expected.token)
assert plain.confidence is None
print("mesh ok")
"""


@pytest.mark.slow
def test_a_split_vocabulary():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("ok") == 5
