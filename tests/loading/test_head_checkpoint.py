"""Heads that are damaged or of something else: one sentence each."""

from __future__ import annotations

import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from specformer_jax.config import DraftConfig
from specformer_jax.errors import UserError
from specformer_jax.loading import head_checkpoint
from specformer_jax.loading.target_config import read_config
from tests.loading.broken import ODD_VALUES


@pytest.fixture
def head(tiny_head, tmp_path):
    return shutil.copytree(tiny_head, tmp_path / "head")


def test_odd_values_anywhere(head, tiny_target):
    target = read_config(tiny_target)
    stored = json.loads((head / "config.json").read_text())
    stored["acceptance"] = [0.5, 0.25]
    loaded = 0
    for key in stored:
        for value in ODD_VALUES:
            (head / "config.json").write_text(json.dumps(stored | {key: value}))
            try:
                draft, _, _ = head_checkpoint.load_head(head, target)
            except UserError as error:
                assert "\n" not in str(error)
                continue
            assert isinstance(draft, DraftConfig)
            loaded += 1
    assert loaded
    for content in ("[]", "{", "[" * 100_000, '{"format": "specformer-head", "version": 1}'):
        (head / "config.json").write_text(content)
        with pytest.raises(UserError, match="is no draft head: "):
            head_checkpoint.load_head(head, target)


def test_pruned_vocabulary_of_something_else(tiny_target, tmp_path):
    target = read_config(tiny_target)
    draft = DraftConfig(max_draft_length=2, draft_vocab_size=8).bind(target)
    shapes = head_checkpoint.boxed_params(target, draft)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), nn.unbox(shapes))
    head_checkpoint.save_head(tmp_path, draft, target, params, np.arange(8), dtype=jnp.float32)
    assert head_checkpoint.load_head(tmp_path, target)[2].tolist() == list(range(8))
    file = tmp_path / "head.safetensors"
    for ids in (np.arange(8) + 1000, np.arange(8) - 1, np.arange(8) / 2):
        save_file(load_file(file) | {"token_ids": ids}, file)
        with pytest.raises(UserError, match="token_ids are not all among the target's"):
            head_checkpoint.load_head(tmp_path, target)
