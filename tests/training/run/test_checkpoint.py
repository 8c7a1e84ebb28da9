"""Checkpoints are what was saved, or they are not taken: damage of every kind, states that are not finite."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specformer_jax.errors import UserError
from specformer_jax.training.run.checkpoint import Checkpoints, load_params

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")


def state(value: float):
    """Data that does not compress, so that a damaged byte may go unnoticed by the decompression."""
    noise = np.random.default_rng(int(value)).normal(size=(64, 8)).astype(np.float32)
    return {"step": jnp.int32(value), "params": {"w": jnp.asarray(noise)}, "opt_state": [jnp.ones(3) * value]}


ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
    state(1),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, state(step), {"data": {"next": step}}, 1.0 + step)
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def restored(folder: Path):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(ABSTRACT)
    finally:
        checkpoints.close()


def flip(file: Path, at: int) -> None:
    whole = bytearray(file.read_bytes())
    whole[at] ^= 1
    file.write_bytes(whole)


def data_of(checkpoint: Path) -> Path:
    """The file that holds most of the state."""
    return max((file for file in (checkpoint / "state").rglob("*") if file.parent.name == "d"), key=os.path.getsize)


def test_what_was_saved_comes_back_and_is_exported(folder):
    step, found, extra = restored(folder)
    assert (step, extra) == (2, {"data": {"next": 2}})
    jax.tree.map(np.testing.assert_array_equal, found, state(2))
    step, params = load_params(folder, 1)
    assert step == 1 and (params["w"] == state(1)["params"]["w"]).all()


def test_saving_warns_of_nothing(tmp_path, caplog):
    checkpoints, absl = Checkpoints(tmp_path / "checkpoints"), logging.getLogger("absl")
    absl.addHandler(caplog.handler)
    try:
        checkpoints.save(1, state(1), {}, 1.0)
        checkpoints.close()
    finally:
        absl.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_flipped_byte_is_passed_over_and_set_aside(folder, caplog, share):
    """Also one in the numbers themselves, which no format notices; it used to be trained from."""
    file = data_of(folder / "2")
    flip(file, int(file.stat().st_size * share))
    with pytest.raises(UserError, match="checkpoint 2 in .* cannot be read"):
        load_params(folder)
    with caplog.at_level(logging.WARNING):
        assert restored(folder)[0] == 1
    assert "checkpoints/2 is damaged, going back to the one before it" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["1", "damaged-2"]
    # A second one of the same step takes another name.
    shutil.copytree(folder / "damaged-2", folder / "2")
    assert restored(folder)[0] == 1
    assert sorted(path.name for path in folder.iterdir()) == ["1", "damaged-2", "damaged-2-2"]


@pytest.mark.parametrize("content", ["", '{"kap', '{"kappa": NaN}', "[]", '{"loss": 1}', '{"kappa": 9, "sha256": "0"}'])
def test_a_checkpoint_that_does_not_say_what_it_is_worth_is_set_aside(folder, caplog, content):
    (folder / "1" / "metrics" / "metrics").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert restored(folder)[0] == 2
    assert "checkpoints/1 is damaged, it is set aside" in caplog.text and (folder / "damaged-1").is_dir()
    (folder / "2" / "metrics" / "metrics").write_text(content)
    with pytest.raises(UserError, match=r"none of the checkpoints \[2\] in .* can be read"):
        restored(folder)
    assert (folder / "2").is_dir()


def test_the_place_in_the_data_is_part_of_what_is_verified(folder):
    file = folder / "2" / "extra" / "_strings.json"
    text = file.read_text()
    assert text.count('\\"next\\": 2') == 1
    file.write_text(text.replace('\\"next\\": 2', '\\"next\\": 3'))
    assert restored(folder)[0] == 1


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_warning(folder, caplog):
    checkpoints = Checkpoints(folder)
    checkpoints._orbax.save_checkpointables(
        3, {"state": state(3), "extra": {"data": {"next": 3}}}, metrics={"kappa": 2.0}
    )
    checkpoints.close()
    with caplog.at_level(logging.WARNING):
        step, _, extra = restored(folder)
    assert step == 3 and extra["data"]["next"] == 3 and "its content is not verified" in caplog.text


def test_a_state_that_is_not_finite_is_not_saved(folder):
    checkpoints = Checkpoints(folder)
    broken = state(3) | {"opt_state": [jnp.array([1.0, jnp.inf])]}
    with pytest.raises(UserError, match=r"opt_state/0 is not finite after step 3.*last good checkpoint is \[2\]"):
        checkpoints.save(3, broken, {}, 1.0)
    assert checkpoints.steps == [1, 2]
    checkpoints.close()
