"""A server whose answers the test writes."""

import pytest

from tests.server.loopback import running
from tests.server.wire.scripted import ScriptedEngine


@pytest.fixture(scope="module")
def served():
    with running(ScriptedEngine()) as served:
        yield served
