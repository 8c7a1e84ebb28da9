"""A server over a real engine with a tiny model."""

import pytest
from loopback import ENGINE, running

from specformer_jax import loading
from specformer_jax.engine import Engine


@pytest.fixture(scope="session")
def engine(tiny_target, tiny_head):
    with Engine(loading.load(str(tiny_target), draft=str(tiny_head), dtype="float32"), ENGINE) as engine:
        yield engine


@pytest.fixture(scope="session")
def served(engine):
    with running(engine) as served:
        yield served
