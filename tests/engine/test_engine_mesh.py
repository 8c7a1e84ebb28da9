"""The engine on a mesh of four devices gives the tokens of one device, and compiles nothing under load.

Rows and pages are split over `data`, heads over `model`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import dataclasses
import jax
from tests.engine import tiny_lm
from specformer_jax.nn.mesh import make_mesh
from specformer_jax.config import SamplingParams
from specformer_jax.engine import Engine, EngineConfig
from specformer_jax.engine.request import Request

lm = tiny_lm.make()
mesh = make_mesh(data=2, model=2)
placed = jax.device_put(lm.params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
shared = (6, 5) * 12
requests = [
    Request((*shared[:n], 1 + n % 12), SamplingParams(temperature=temperature, seed=n, max_new_tokens=20))
    for n in (1, 4, 9, 24)
    for temperature in (0.0, 1.0)
]
config = EngineConfig(rows=4, max_context=60, chunk=16, cache_positions=160, budgets=(8, 20))
compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: compiled.append(event))
with Engine(dataclasses.replace(lm, params=placed), config, tiny_lm.Cycle(), mesh) as engine:
    scheduler = engine._scheduler
    cache = scheduler._state.cache[0].k
    part = cache.sharding.shard_shape(cache.shape)
    assert part[:2] == (cache.shape[0] // 2, cache.shape[1] // 2), cache.sharding
    assert [len(pool._holders) for pool in scheduler._pools] == [5, 5]
    compiled.clear()
    handles = [engine.submit(request) for request in requests]
    got = [[token.id for delta in handle for token in delta.tokens] for handle in handles]
    requests.append(requests[-1])  # once more, when the others have ended: its first page is found where it is
    got.append([token.id for delta in engine.submit(requests[-1]) for token in delta.tokens])
    assert not [event for event in compiled if "compile" in event], compiled
    stats = engine.stats()
    assert stats.cached_tokens > 0 and stats.accepted_tokens > 0, stats
    assert scheduler._pool_of == [scheduler._pools[0]] * 2 + [scheduler._pools[1]] * 2
assert got == [tiny_lm.naive(lm, request.prompt_ids, request.sampling_params) for request in requests]
print("same tokens")
"""


@pytest.mark.slow
def test_the_same_tokens_on_a_mesh():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "same tokens" in done.stdout, done.stderr[-3000:]
