"""A server over a real engine with a tiny model."""

import pytest

from specformer_jax.decoding.state import BINS
from specformer_jax.engine import Engine
from specformer_jax.loading.language_model import load
from specformer_jax.planning.calibration import Calibration
from specformer_jax.planning.planner import FixedDrafts
from tests.server.loopback import ENGINE, running


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Kept: one engine serves all files."""


@pytest.fixture(scope="session")
def engine(tiny_target, tiny_head):
    """It drafts as much as a request allows, so that there is something to see."""
    lm = load(str(tiny_target), draft=str(tiny_head), dtype="float32")
    slots = lm.model.max_draft_length
    with Engine(lm, ENGINE, planner=FixedDrafts(slots, Calibration(slots, BINS))) as engine:
        yield engine


@pytest.fixture(scope="session")
def served(engine):
    with running(engine) as served:
        yield served
