"""The training loop end to end on a tiny target: restarts, damage, bad input."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import logging
import os
import shutil
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from specformer_jax import files
from specformer_jax.drafters import specformer
from specformer_jax.errors import UserError
from specformer_jax.loading import head_checkpoint
from specformer_jax.nn.mesh import make_mesh
from specformer_jax.training import export, fit, metrics, optimizer, placement, train_step
from specformer_jax.training.run import finite
from specformer_jax.training.run.checkpoint import Checkpoints
from specformer_jax.training.run.start import Start

from . import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def inputs():
    return fit.Inputs(tiny.TARGET, tiny.target_params(), tiny.documents())


def test_a_stopped_run_goes_on_bit_for_bit_past_a_damaged_checkpoint(inputs, tmp_path, caplog):
    config = tiny.config(steps=12, checkpoint_every=4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit.fit(config, inputs, whole, progress=False)
    fit.fit(config, inputs, parts, stop_at=8, progress=False)
    newest = parts / "checkpoints" / "8"
    for file in newest.rglob("*"):
        if file.is_file() and "state" in file.parts and "d" in file.parts:
            os.truncate(file, file.stat().st_size // 2)
    with caplog.at_level(logging.WARNING):
        fit.fit(config, inputs, parts, progress=False)
    assert any("checkpoints/8" in record.getMessage() for record in caplog.records)
    assert tiny.losses(whole) == tiny.losses(parts)
    assert len(tiny.losses(whole)) == 12 and tiny.losses(whole)[-1] < tiny.losses(whole)[0]

    step = export.export(whole, tmp_path / "head", target_name="tiny")
    draft, params, token_ids = head_checkpoint.load_head(tmp_path / "head", tiny.TARGET)
    assert step == 12 and draft == config.draft and len(token_ids) == 64
    assert jax.tree.leaves(params)[0].dtype == jnp.bfloat16

    onward = tiny.config(steps=1, init=str(tmp_path / "head"))
    fit.fit(onward, inputs, tmp_path / "onward", progress=False)
    assert abs(tiny.losses(tmp_path / "onward")[0] - tiny.losses(whole)[-1]) < abs(
        tiny.losses(whole)[0] - tiny.losses(whole)[-1]
    )
    pruned = dataclasses.replace(onward, draft=dataclasses.replace(onward.draft, draft_vocab_size=32))
    fit.fit(pruned, inputs, tmp_path / "pruned", progress=False)
    export.export(tmp_path / "pruned", tmp_path / "pruned-head")
    assert len(head_checkpoint.load_head(tmp_path / "pruned-head", tiny.TARGET)[2]) == 32


def test_other_options_leave_a_run_as_it_is(inputs, tmp_path):
    config, run = tiny.config(steps=6, checkpoint_every=2), tmp_path / "run"
    fit.fit(config, inputs, run, stop_at=4, progress=False)

    def content():
        return {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}

    before = content()
    fewer = dataclasses.replace(config, draft=dataclasses.replace(config.draft, max_draft_length=2))
    for changed, message in (
        (fewer, "draft.max_draft_length 3, not 2: go on with the options it was started with"),
        (dataclasses.replace(config, optimizer="muon"), "optimizer adamw, not muon"),
    ):
        with pytest.raises(UserError, match=message):
            fit.fit(changed, inputs, run, progress=False)
        assert content() == before
    # What cannot be read for a reason of its own, a full memory say, is not taken for damage.
    checkpoints = Checkpoints(run / "checkpoints")
    with pytest.raises(UserError, match="none of the checkpoints"):
        checkpoints.restore({"other": jax.ShapeDtypeStruct((7,), jnp.float32)})
    checkpoints.close()
    assert content() == before
    clipped = dataclasses.replace(config, clip=1.0)  # after a spike of the loss, say
    with pytest.raises(UserError, match="clip 0.0, not 1.0, and its curve would become another's"):
        fit.fit(clipped, inputs, run, progress=False)
    assert content() == before
    fit.fit(clipped, inputs, run, start=Start(allow_change=("clip",)), progress=False)
    assert len(tiny.losses(run)) == 6
    before = content()
    fit.fit(dataclasses.replace(clipped, log_every=3), inputs, run, progress=False)  # nothing is left to do
    assert content() == before


def test_export_leaves_a_running_fit_alone(inputs, tmp_path):
    run = tmp_path / "run"
    fit.fit(tiny.config(steps=2), inputs, run, progress=False)
    saving = run / "checkpoints" / "3.orbax-checkpoint-tmp"
    (saving / "state").mkdir(parents=True)
    assert export.export(run, tmp_path / "head") == 2
    time.sleep(1)  # clearing away is done in the background
    assert (saving / "state").is_dir()
    shutil.copytree(run, tmp_path / "torn", ignore=shutil.ignore_patterns("3.orbax*"))
    shutil.rmtree(tmp_path / "torn" / "checkpoints" / "2" / "state")
    with pytest.raises(UserError, match="checkpoint 2 in .* cannot be read"):
        export.export(tmp_path / "torn", tmp_path / "torn-head")
    checkpoints = Checkpoints(run / "checkpoints")  # the next fit's: what a killed one left goes
    deadline = time.monotonic() + 20
    while saving.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    checkpoints.close()


def test_a_sequential_ffn_can_be_narrowed(inputs, tmp_path):
    """The units that weigh most stay as they were; none is another head."""

    def config(width, **changes):
        plain = tiny.config(steps=1, learning_rate=0.0, final_learning_rate=0.0, **changes)
        return dataclasses.replace(plain, draft=dataclasses.replace(plain.draft, sequential_ffn=width))

    def exported(name):
        export.export(tmp_path / name, tmp_path / f"{name}-head")
        return head_checkpoint.load_head(tmp_path / f"{name}-head", tiny.TARGET)[1]["sequential"]

    fit.fit(config(6), inputs, tmp_path / "wide", progress=False)
    exported("wide")
    # Four of the six units are made to weigh something: `down` starts at zero.
    file = tmp_path / "wide-head" / "head.safetensors"
    tensors = safetensors.numpy.load_file(file)
    down = tensors["draft/sequential/ffn/down"]
    down[[0, 2, 3, 5]] = np.array([1, 2, 3, 4], down.dtype)[:, None]
    safetensors.numpy.save_file(tensors, file)
    # What a head's weights are is told by its config.json; one that does not tell is read as it is.
    told = json.loads((file.parent / "config.json").read_text())
    untold = {key: value for key, value in told.items() if key not in ("weights", files.SEAL)}
    (file.parent / "config.json").write_text(json.dumps(untold))

    init = str(tmp_path / "wide-head")
    fit.fit(config(4, init=init), inputs, tmp_path / "narrow", progress=False)
    narrow = exported("narrow")
    for got, wide in (
        (narrow["ffn"]["down"], down),
        (narrow["ffn"]["gate_up"].T, tensors["draft/sequential/ffn/gate_up"].T),
        (narrow["slot_gate_up"].T, tensors["draft/sequential/slot_gate_up"].T),
    ):
        np.testing.assert_array_equal(got.astype(np.float32), wide[[0, 2, 3, 5]].astype(np.float32))
    with pytest.raises(UserError, match="has a sequential FFN: set draft.sequential_ffn to a width"):
        fit.fit(config(None, init=init), inputs, tmp_path / "other", progress=False)


def test_a_head_that_grows_forecasts_what_it_did(inputs, tmp_path):
    """Its new parts begin as the identity; what shrinks is another head."""

    def sized(plain, **sizes):
        return dataclasses.replace(plain, draft=dataclasses.replace(plain.draft, **sizes))

    fit.fit(sized(tiny.config(steps=3), ffn=24, sequential_ffn=6), inputs, tmp_path / "small", progress=False)
    export.export(tmp_path / "small", tmp_path / "head")
    onward = tiny.config(steps=1, learning_rate=0.0, final_learning_rate=0.0, init=str(tmp_path / "head"))
    same = sized(onward, ffn=24, sequential_ffn=6)
    larger = sized(onward, ffn=40, sequential_ffn=10, draft_blocks=2)
    for name, config in (("same", same), ("larger", larger)):
        fit.fit(config, inputs, tmp_path / name, progress=False)
    assert tiny.losses(tmp_path / "larger") == pytest.approx(tiny.losses(tmp_path / "same"), rel=1e-5)
    more_slots = sized(same, max_draft_length=5)
    fit.fit(more_slots, inputs, tmp_path / "more", progress=False)
    export.export(tmp_path / "more", tmp_path / "more-head")
    kernels = [
        head_checkpoint.load_head(tmp_path / name, tiny.TARGET)[1]["slots"]["kernel"] for name in ("head", "more-head")
    ]
    assert kernels[0].shape[1] == 3 and kernels[1].shape[1] == 5
    np.testing.assert_array_equal(kernels[1][:, :3], kernels[0])
    for fewer in ({"max_draft_length": 2}, {"ffn": 16}, {"bidirectional": False}):
        with pytest.raises(UserError, match="another one than the configuration's, and none that can grow to it"):
            fit.fit(sized(same, **fewer), inputs, tmp_path / "other", progress=False)


def test_accumulation_remat_and_offline_hooks_change_nothing(inputs, tmp_path):
    trainer_losses = []
    for changes in ({}, {"accumulation": 2, "remat": True}):
        run = tmp_path / f"run{len(trainer_losses)}"
        fit.fit(tiny.config(steps=3, **changes), inputs, run, progress=False)
        trainer_losses.append(tiny.losses(run))
    np.testing.assert_allclose(trainer_losses[0], trainer_losses[1], rtol=1e-5)
    fit.fit(tiny.config(steps=3), inputs, tmp_path / "off", offline=tmp_path / "hooks", progress=False)
    np.testing.assert_allclose(trainer_losses[0], tiny.losses(tmp_path / "off"), rtol=2e-2)  # stored in bfloat16


def test_a_store_of_hooks_is_of_these_documents_layers_and_target(inputs, tmp_path, monkeypatch):
    runs = itertools.count()

    def train(config, inputs):
        fit.fit(config, inputs, tmp_path / f"run{next(runs)}", offline=tmp_path / "hooks", progress=False)

    config = tiny.config(steps=1)
    train(config, inputs)
    other_layers = dataclasses.replace(config, draft=dataclasses.replace(config.draft, hook_layers=(0, 2)))
    same_layers = dataclasses.replace(config, draft=dataclasses.replace(config.draft, next_token_hook=False))
    other_target = jax.tree.map(lambda x: x * 1.5, inputs.target_params)
    train(same_layers, inputs)
    for changed, read in (
        (config, dataclasses.replace(inputs, documents=tiny.documents(10))),
        (other_layers, inputs),
        (config, dataclasses.replace(inputs, target_params=other_target)),
    ):
        with pytest.raises(UserError, match="other data, other layers or another target"):
            train(changed, read)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    shutil.rmtree(tmp_path / "hooks")
    with pytest.raises(UserError, match="hooks cannot be stored.*No space left"):
        train(config, inputs)


def test_muon_learns(inputs, tmp_path):
    config = tiny.config(steps=12, optimizer="muon", learning_rate=0.004, init="target")
    fit.fit(config, inputs, tmp_path / "muon", progress=False)
    losses = tiny.losses(tmp_path / "muon")
    assert min(losses[-3:]) < losses[0]


def test_a_loss_that_is_not_finite_stops_with_step_and_batch(inputs, tmp_path):
    fit.fit(tiny.config(steps=8), inputs, tmp_path / "run", stop_at=2, progress=False)
    broken = jax.tree.map(lambda x: x * jnp.nan, inputs.target_params)
    with pytest.raises(UserError, match=r"step 3 is not finite.*batch 2.*\[2\]; the target's embedding is not finite"):
        fit.fit(
            tiny.config(steps=8),
            fit.Inputs(tiny.TARGET, broken, inputs.documents),
            tmp_path / "run",
            progress=False,
        )
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps == [2]
    checkpoints.close()


def test_a_target_that_overflows_is_blamed_and_no_other(inputs):
    trainer, mesh = train_step.Trainer(tiny.TARGET, tiny.config()), make_mesh()
    tokens = np.tile(tiny.documents(1)[0].tokens[:8], (2, 1))
    for scale, reason in (
        (1.0, "a lower learning rate may help"),
        (1e36, "target's hidden states are not finite in f"),  # gate times up is too large for a float32
    ):
        layer = inputs.target_params["layer_0"]
        ffn = jax.tree.map(lambda x, scale=scale: x * scale, layer["ffn"])
        params = inputs.target_params | {"layer_0": layer | {"ffn": ffn}}
        assert reason in finite.blame(trainer, mesh, train_step.Frozen(params), tokens)


def test_a_line_of_metrics_covers_log_every_steps_and_ends_at_checkpoints(inputs, tmp_path):
    """Whatever a line covers, all lines together say the same: their tokens, and their means of the loss."""
    every, some = tmp_path / "every", tmp_path / "some"
    fit.fit(tiny.config(steps=8, checkpoint_every=5), inputs, every, progress=False)
    config = tiny.config(steps=8, checkpoint_every=5, log_every=3)
    fit.fit(config, inputs, some, stop_at=6, progress=False)
    fit.fit(config, inputs, some, progress=False)  # goes on from the last checkpoint, and so do its lines
    single, lines = (metrics.read(run / "metrics.jsonl") for run in (every, some))
    assert [row["step"] for row in single] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["step"] for row in lines] == [3, 5, 6, 8]
    for row, first in zip(lines, (0, 3, 5, 6), strict=True):
        covered = single[first : row["step"]]
        assert row["loss"] == np.mean([step["loss"] for step in covered])
        assert row["tokens"] == sum(step["tokens"] for step in covered)
        np.testing.assert_allclose(row["kappa"], np.mean([step["kappa"] for step in covered]), atol=2e-6)
        assert len(row["slot_accuracy"]) == 3


def test_a_loss_that_is_not_finite_is_noticed_late_but_named_and_never_saved(inputs, tmp_path):
    config = tiny.config(steps=8, checkpoint_every=4, log_every=100)
    fit.fit(config, inputs, tmp_path / "run", stop_at=2, progress=False)
    broken = jax.tree.map(lambda x: x * jnp.nan, inputs.target_params)
    with pytest.raises(UserError, match=r"step 3 is not finite.*batch 2.*\[2\]; the target's embedding is not finite"):
        fit.fit(config, dataclasses.replace(inputs, target_params=broken), tmp_path / "run", progress=False)
    assert [row["step"] for row in metrics.read(tmp_path / "run" / "metrics.jsonl")] == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": (2, 1, 1)}, "needs 2 devices"),
        ({"batch_rows": 3, "accumulation": 2}, "does not divide"),
        ({"anchors": 100}, "anchors 100"),
        ({"optimizer": "sgd"}, "sgd"),
        ({"soft": 1.5}, "soft"),
        ({"checkpoint_every": 0}, "checkpoint_every 0 must be a whole number from 1"),
        ({"log_every": 0}, "log_every 0"),
    ],
)
def test_impossible_configurations(inputs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        fit.fit(tiny.config(**changes), inputs, tmp_path / "run", progress=False)


def test_a_folder_that_cannot_be_written_is_one_sentence(inputs, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be kept"):
        fit.fit(tiny.config(), inputs, run, progress=False)


def test_state_is_born_in_its_shardings():
    trainer = train_step.Trainer(tiny.TARGET, tiny.config(optimizer="muon"))
    mesh = make_mesh()
    state = placement.init_state(trainer, mesh, 0)
    places = placement.state_shardings(trainer, mesh)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_the_downsampler_learns_in_float32_from_bfloat16_hooks():
    down = specformer.Downsampler(32, (0, 1, 1, 2), 1e-5)
    hooks = jax.random.normal(jax.random.key(0), (2, 9, 4, 32), jnp.bfloat16)
    params = nn.unbox(down.init(jax.random.key(1), hooks))
    gradient = jax.grad(lambda p: jnp.sin(down.apply(p, hooks).astype(jnp.float32)).sum())(params)["params"]["kernel"]
    assert gradient.dtype == jnp.float32
    assert (gradient != gradient.astype(jnp.bfloat16)).mean() > 0.5


def test_weight_decay_acts_on_matrices_alone():
    for name in ("adamw", "muon"):
        config = tiny.config(optimizer=name, weight_decay=0.5, learning_rate=0.1)
        params = jax.tree.map(jnp.ones_like, train_step.Trainer(tiny.TARGET, config).init(jax.random.key(0)).params)
        chosen = optimizer.make_optimizer(config)
        state, updates = chosen.init(params), None
        for _ in range(2):  # the first step's rate is 0
            updates, state = chosen.update(jax.tree.map(jnp.zeros_like, params), state, params)
        matrices = {"kernel", "gate_up", "down", "slot_gate_up"}
        for path, update in flatten_dict(updates).items():
            assert (np.abs(update).max() > 0) == (path[-1] in matrices), path


def test_a_learning_rate_of_0_for_adam_leaves_scales_alone():
    config = tiny.config(optimizer="muon", adam_learning_rate=0.0)
    params = train_step.Trainer(tiny.TARGET, config).init(jax.random.key(0)).params
    chosen = optimizer.make_optimizer(config)
    state = chosen.init(params)
    for _ in range(2):
        updates, state = chosen.update(jax.tree.map(jnp.ones_like, params), state, params)
    moved = {path[-1] for path, update in flatten_dict(updates).items() if np.abs(update).max() > 0}
    assert "kernel" in moved and not moved & {"scale", "bias"}


def test_metrics_are_complete_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + '\n{"st')
    assert metrics.read(tmp_path / "metrics.jsonl") == [{"step": 1}]
