"""Tile sizes that were measured on a device: who reads them, and where."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import lowering_for, tuning
from pallas_kernels.tuning import AttentionBlocks, SampleBlocks, TileKey

WINDOW = AttentionBlocks(rows=48, positions=32)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table for the device that the tests run on, in the file that the environment names."""
    here = TileKey(jax.devices()[0].device_kind, "tpu", "attention", "bfloat16", "window")
    elsewhere = here._replace(device="another chip", size="decode")
    file = tmp_path / "tiles.json"
    file.write_text(tuning.text({here: WINDOW, elsewhere: AttentionBlocks(1, 1)}))
    monkeypatch.setenv("SPECFORMER_TILES", str(file))
    monkeypatch.setattr(tuning, "_adopted", {})
    tuning._stored_table.cache_clear()
    yield file
    tuning._stored_table.cache_clear()


def picked(rows, dtype=jnp.bfloat16, body="tpu"):
    return tuning.pick(AttentionBlocks, body, dtype, rows)


def test_a_measured_entry_is_for_its_device_kernel_dtype_and_size(table):
    guess = AttentionBlocks(rows=128, positions=1024)
    assert picked(36) == WINDOW
    assert picked(128) == picked(36, jnp.float32) == guess and picked(36, body="cuda") != WINDOW
    with tuning.using(AttentionBlocks(8, 8)):
        assert picked(36) == AttentionBlocks(8, 8)
    with lowering_for("tpu"):
        assert picked(36) == guess, "no device is there, so none was measured"
    with lowering_for("tpu", interpret=True):
        assert picked(36) == WINDOW


def test_a_process_takes_over_what_it_measures(table):
    key = TileKey(jax.devices()[0].device_kind, "cuda", "sampling", "bfloat16", "decode")
    tuning.adopt({key: SampleBlocks(16, 64, 32)})
    assert tuning.pick(SampleBlocks, "cuda", jnp.bfloat16, 64) == SampleBlocks(16, 64, 32)
    assert picked(36) == WINDOW


@pytest.mark.parametrize("content", ["", "{}", '[{"device": "a"}]', '[{"a": 1}]', "[1]"])
def test_a_damaged_table_says_so(table, content):
    text = tuning.text({TileKey("a", "tpu", "attention", "bfloat16", "window"): WINDOW}).replace("48", '"48"')
    table.write_text(content if content != "{}" else text)
    with pytest.raises(ValueError, match=r"tiles.json is no table of tile sizes \(.*measure one anew"):
        picked(36)


def test_the_shipped_table_is_one():
    assert tuning.parse(tuning.TABLE_FILE.read_text()) is not None
