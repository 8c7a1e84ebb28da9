"""The tiny model and an engine over it."""

import pytest
import tiny_lm
from tiny_engine import CONFIG

from specformer_jax.engine import Engine


@pytest.fixture(scope="module")
def lm():
    return tiny_lm.make()


@pytest.fixture(scope="module")
def engine(lm):
    """One for all tests that leave it as they found it."""
    with Engine(lm, CONFIG, tiny_lm.Cycle()) as engine:
        yield engine
