"""Fixtures of the kernel tests."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked_shapes():
    """Shapes in annotations go unchecked, as they do for users: the package's own sentences are what is raised."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
