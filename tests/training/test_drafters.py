"""The drafters that SpecFormer is compared with learn in the same loop, and export what says who they are."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from specformer_jax.config import LOOKUPS, REUSES, TRAINED
from specformer_jax.errors import UserError
from specformer_jax.loading import head_checkpoint
from specformer_jax.training import export, fit, metrics, optimizer, train_step
from specformer_jax.training.config import BoundConfig, load_config
from specformer_jax.training.data.documents import Document

from . import tiny
from .test_config import CONFIGS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")


def config_of(drafter: str, reuse: str = "hybrid", **changes) -> BoundConfig:
    draft = dataclasses.replace(tiny.config().draft, drafter=drafter, hook_layers=(), reuse=reuse)
    return tiny.config(draft=draft, **changes)


@pytest.mark.parametrize(
    ("drafter", "reuse"),
    [("medusa", "hybrid"), ("eagle", "hybrid"), ("dflash", "hybrid"), ("kv", "kv"), ("kv", "hybrid")],
)
def test_the_loss_falls_and_the_export_names_the_drafter(drafter, reuse, tmp_path):
    counting = [Document(str(i), (3 + (i + np.arange(24)) % 8).astype(np.int32), ((5, 24),), 0.0) for i in range(30)]
    inputs = fit.Inputs(tiny.TARGET, tiny.target_params(), counting)
    config = config_of(drafter, reuse, steps=12, init="target", soft=0.0, learning_rate=3e-2, checkpoint_every=50)
    fit.fit(config, inputs, tmp_path / "run", progress=False)
    losses = [row["loss"] for row in metrics.read(tmp_path / "run" / "metrics.jsonl")]
    # A random target has small logits: from 3.94 the best head of all would reach about 3.3.
    assert len(losses) == 12 and losses[-1] < 0.97 * losses[0]
    export.export(tmp_path / "run", tmp_path / "head")
    draft, params, _ = head_checkpoint.load_head(tmp_path / "head", tiny.TARGET)
    assert (draft.drafter, draft.reuse) == (drafter, reuse) and jax.tree.leaves(params)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("drafter", ["specformer", "medusa", "eagle"])
@pytest.mark.parametrize("init", ["identity", "target"])
def test_every_drafter_starts_by_saying_what_the_target_says(drafter, init):
    """Before any training all of them forecast the target's own last hidden state, so none has a head start."""
    trainer = train_step.Trainer(tiny.TARGET, config_of(drafter))
    target_params = tiny.target_params()
    params = trainer.init(jax.random.key(0)).params
    if init == "target":
        params = trainer.start_from_target(params, target_params)
    hooks = jax.random.normal(jax.random.key(1), (2, 6, len(trainer.config.draft.hook_layers), tiny.TARGET.width))
    slots = trainer.drafter.apply({"params": params}, hooks, hooks[:, :, 0])
    expected = hooks[:, :, -1]
    for j in range(3):
        direction = jnp.sum(slots[:, :, j] * expected, -1)
        cosine = direction / jnp.linalg.norm(slots[:, :, j], axis=-1) / jnp.linalg.norm(expected, axis=-1)
        assert float(cosine.min()) > 0.999


@pytest.mark.parametrize("drafter", TRAINED)
def test_muon_takes_every_matrix(drafter):
    """So that "trained the same way" is true of all; each matrix is read along its input and its output."""
    config = config_of(drafter)
    config = dataclasses.replace(config, draft=dataclasses.replace(config.draft, sequential_ffn=24))
    params = jax.eval_shape(train_step.Trainer(tiny.TARGET, config).init, jax.random.key(0)).params
    for path, axes in flatten_dict(optimizer.muon_axes(params)).items():
        assert (axes is None) == (path[-1] in ("scale", "bias", "mask")), path
    if drafter == "medusa":
        axes = optimizer.muon_axes(params)["kernel"]
        assert params["kernel"].shape == (32, 3, 32) and (axes.reduction_axis, axes.output_axis) == (0, 2)


@pytest.mark.parametrize("reuse", REUSES)
def test_packed_documents_do_not_see_each_other(reuse):
    """The second of a row is drafted as if it were alone: its positions begin anew, and so does what is attended to."""
    config = config_of("kv", reuse, anchors=None)
    trainer, random = train_step.Trainer(tiny.TARGET, config), jax.random.key(2)
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    params = jax.tree.map(noise, trainer.init(jax.random.key(0)).params)
    frozen = trainer.freeze(tiny.target_params(), None)
    tokens = jax.random.randint(random, (1, 12), 3, tiny.TARGET.vocab_size)

    def slots(tokens, segments):
        T = tokens.shape[1]
        batch = {"tokens": tokens, "segments": segments, "anchors": jnp.arange(T)[None]}
        return trainer.forecast(params, frozen, batch)[0][: T - 3]  # slots at the end know no token after them

    packed = slots(tokens, jnp.array([[1] * 5 + [2] * 7]))
    assert jnp.allclose(packed[5:], slots(tokens[:, 5:], jnp.ones((1, 7), jnp.int32)), atol=1e-5)
    other = slots(tokens.at[0, 1].add(1), jnp.array([[1] * 5 + [2] * 7]))
    assert not jnp.allclose(packed[1:5], other[1:5], atol=1e-3) and jnp.array_equal(packed[5:], other[5:])


def test_a_configuration_can_train_another_drafter():
    config = load_config(CONFIGS[0], ["draft.max_draft_length=3"], drafter="eagle")
    assert config.draft.drafter == "eagle" and config.draft.max_draft_length == 3
    assert config.draft.bind(tiny.TARGET).hook_layers == (1, 1, 2)


@pytest.mark.parametrize("drafter", LOOKUPS)
def test_lookups_are_not_trained(drafter):
    with pytest.raises(UserError, match=f"the {drafter} drafter has nothing to train"):
        config_of(drafter)
