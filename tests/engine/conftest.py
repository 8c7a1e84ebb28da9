"""The tiny model and an engine over it."""

import pytest

from specformer_jax.engine import Engine
from tests.engine import tiny_lm
from tests.engine.tiny_engine import CONFIG


@pytest.fixture(scope="module")
def lm():
    return tiny_lm.make()


@pytest.fixture(scope="module")
def engine(lm):
    """One for all tests that leave it as they found it."""
    with Engine(lm, CONFIG, tiny_lm.Cycle()) as engine:
        yield engine
