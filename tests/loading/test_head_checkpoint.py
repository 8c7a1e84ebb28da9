"""Heads that are damaged or of something else: one sentence each."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from specformer_jax import files
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
    stored = files.read_sealed(head / "config.json")
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
    config = head_checkpoint.read_config(tmp_path)
    del config["weights"]
    (tmp_path / "config.json").write_text(json.dumps(config))  # as heads were before they had digests
    for ids in (np.arange(8) + 1000, np.arange(8) - 1, np.arange(8) / 2):
        save_file(load_file(file) | {"token_ids": ids}, file)
        with pytest.raises(UserError, match="token_ids are not all among the target's"):
            head_checkpoint.load_head(tmp_path, target)


def make(target, value: float):
    draft = DraftConfig(max_draft_length=2, ffn=int(8 * value)).bind(target)
    shapes = nn.unbox(head_checkpoint.boxed_params(target, draft))
    return draft, jax.tree.map(lambda x: np.full(x.shape, value, np.float32), shapes)


def test_a_damaged_head_is_refused(tiny_target, tmp_path):
    """A flipped bit in its numbers or its config, and a config beside the weights of another head."""
    target = read_config(tiny_target)
    for name, value in (("a", 1.0), ("b", 2.0)):
        draft, params = make(target, value)
        head_checkpoint.save_head(tmp_path / name, draft, target, params)
    weights, config = tmp_path / "a" / "head.safetensors", tmp_path / "a" / "config.json"
    for file, message in (
        (weights, "head.safetensors is not what was written there"),
        (config, "a is no draft head: "),
    ):
        whole = file.read_bytes()
        for at in (len(whole) // 3, len(whole) // 2, len(whole) - 3):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(UserError, match=message):
                head_checkpoint.load_head(tmp_path / "a", target)
        file.write_bytes(whole)
    head_checkpoint.load_head(tmp_path / "a", target)
    shutil.copy(tmp_path / "b" / "head.safetensors", weights)
    with pytest.raises(UserError, match="not what was written there"):
        head_checkpoint.load_head(tmp_path / "a", target)


def test_a_head_that_is_written_over_another_is_the_old_or_the_new_one(tiny_target, tmp_path, monkeypatch):
    """Whichever renaming a killed process came to."""
    target = read_config(tiny_target)
    rename, left, seen = Path.replace, 0, []
    (draft_1, params_1), (draft_2, params_2) = make(target, 1.0), make(target, 2.0)

    def replace(self, to):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return rename(self, to)

    monkeypatch.setattr(Path, "replace", replace)
    for renamings in range(4):
        left = 100
        head_checkpoint.save_head(tmp_path, draft_1, target, params_1)
        left = renamings
        with contextlib.suppress(KeyboardInterrupt):
            head_checkpoint.save_head(tmp_path, draft_2, target, params_2)
        draft, params, _ = head_checkpoint.load_head(tmp_path, target)
        values = {float(x) for leaf in jax.tree.leaves(params) for x in leaf.astype(np.float32).flat}
        assert values == {draft.ffn / 8}
        seen.append(values.pop())
    assert seen == [1.0, 1.0, 2.0, 2.0]
    assert sorted(os.listdir(tmp_path)) == ["config.json", "head.safetensors"]


def test_a_head_can_be_read_by_whoever_may_read_its_folder(tiny_target, tmp_path):
    """safetensors writes its files for their owner alone."""
    target = read_config(tiny_target)
    before = os.umask(0o027)
    try:
        draft, params = make(target, 1.0)
        head_checkpoint.save_head(tmp_path, draft, target, params)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == {"0o640"}


def test_the_shipped_heads_have_digests():
    shipped = list((Path(head_checkpoint.__file__).parents[1] / "pretrained").glob("*/config.json"))
    assert shipped
    for file in shipped:
        assert files.SEAL in json.loads(file.read_text()) and "weights" in head_checkpoint.read_config(file.parent)
