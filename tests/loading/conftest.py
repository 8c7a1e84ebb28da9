"""What the tests of files share."""

import shutil
from pathlib import Path

import pytest

from specformer_jax.loading.gguf_reader import open_gguf

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the tiny Llama model, to break."""
    return Path(shutil.copytree(GOLDEN / "llama", tmp_path / "model"))


@pytest.fixture
def sp(tmp_path) -> Path:
    """A copy of the tiny Llama model with a Llama-2 tokenizer, to break."""
    return Path(shutil.copytree(GOLDEN / "sp", tmp_path / "sp"))


@pytest.fixture(autouse=True)
def _forget_open_files():
    yield
    open_gguf.cache_clear()
