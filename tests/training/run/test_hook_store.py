"""Stored hooks are what the target gave, or they are not trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from specformer_jax.errors import UserError
from specformer_jax.training.data.batches import Batches, iterate_batches
from specformer_jax.training.data.hook_store import HookStore

from .. import tiny

DOCUMENTS = tiny.documents(7)


def read(tokens: np.ndarray) -> np.ndarray:
    """Hooks that tell their token and place."""
    places = np.arange(tokens.shape[1])
    return (tokens[:, :, None, None] * 64 + places[:, None, None] + np.arange(6).reshape(2, 3)).astype(np.uint16)


def opened(folder: Path) -> HookStore:
    return HookStore(folder, DOCUMENTS, (0, 2), 3, "a target")


@pytest.fixture
def full(tmp_path):
    store = opened(tmp_path / "hooks")
    store.fill(read, report=lambda line: None)
    return tmp_path / "hooks"


def test_what_was_read_is_stored_and_a_full_store_is_only_read(full):
    store = opened(full)
    store.fill(lambda tokens: pytest.fail("it was read already"))
    for i, document in enumerate(DOCUMENTS):
        np.testing.assert_array_equal(store[i], read(document.tokens[None])[0])
        assert not store[i].flags.writeable


@pytest.mark.parametrize("name", ["hooks.bin", "hooks.digests"])
@pytest.mark.parametrize("change", ["half", "empty", "gone", "longer"])
def test_files_of_another_size_are_refused(full, name, change):
    """numpy would fill up a short one with zeros."""
    file = full / name
    whole = file.read_bytes()
    file.write_bytes({"half": whole[: len(whole) // 2], "longer": whole + b"0"}.get(change, b""))
    if change == "gone":
        file.unlink()
    before = {path.name: path.read_bytes() for path in full.iterdir()}
    with pytest.raises(UserError, match=f"{name} has \\d+ bytes and not {len(whole)}: it is damaged"):
        opened(full)
    assert {path.name: path.read_bytes() for path in full.iterdir()} == before


@pytest.mark.parametrize("name", ["hooks.bin", "hooks.digests"])
def test_a_flipped_bit_is_found_when_its_document_is_trained_on(full, name):
    file = full / name
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 4
    file.write_bytes(whole)
    store = opened(full)
    batches = Batches(DOCUMENTS, slots=2, sequence_length=64, rows=4, hooks=store.__getitem__)
    with pytest.raises(UserError, match=r"hooks.bin is damaged, in document \d"):
        for _, _ in zip(range(3), iterate_batches(batches), strict=False):
            pass


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"meta"', '{"meta": {}, "done": 7}'])
def test_a_description_of_something_else_is_one_sentence(full, content):
    (full / "hooks.json").write_text(content)
    with pytest.raises(UserError, match="hooks"):
        opened(full)


def test_a_description_that_was_changed_is_refused(full):
    stored = json.loads((full / "hooks.json").read_text())
    for changed in (stored | {"done": 3}, stored | {"done": True, "sha256": None}):
        (full / "hooks.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="hooks.json is not what was written there"):
            opened(full)
    del stored["sha256"]
    for done in (-1, 8, 2.5, "7", None):
        (full / "hooks.json").write_text(json.dumps(stored | {"done": done}))
        with pytest.raises(UserError, match="documents are done: remove"):
            opened(full)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])
def test_hidden_states_that_are_not_finite_are_the_targets(tmp_path, bits):
    def broken(tokens):
        hooks = read(tokens)
        hooks[0, 3, 1, 2] = bits
        return hooks

    with pytest.raises(UserError, match="the target's hidden states of the document '.' are not finite"):
        opened(tmp_path).fill(broken)
    store = opened(tmp_path)  # and nothing of them is kept
    store.fill(read, report=lambda line: None)
    np.testing.assert_array_equal(store[0], read(DOCUMENTS[0].tokens[None])[0])
