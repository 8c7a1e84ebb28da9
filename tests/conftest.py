"""Fixtures that several test files share."""

import os

# Tests compare CPU numbers; where an accelerator's plug-in is installed it must not be taken.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

from specformer_jax import fetch


@pytest.fixture(scope="session")
def builtin_path():
    """The built-in target's GGUF file, fetched once."""
    return fetch.builtin_gguf()
