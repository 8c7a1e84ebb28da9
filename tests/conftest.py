"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from specformer_jax import fetch


@pytest.fixture(scope="session")
def builtin_path() -> Path:
    """The built-in target's GGUF file, downloaded once into the user's cache."""
    return fetch.builtin_gguf()
