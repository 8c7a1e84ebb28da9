"""A model loaded for a CPU: packed weights where they are multiplied, one copy, the same answers at any budget."""

import importlib.util
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PackedMatrix, cpu, lowering_for, unpack
from specformer_jax.batch.generation import generate_ids
from specformer_jax.config import DraftConfig, SamplingParams
from specformer_jax.loading import packing
from specformer_jax.loading.language_model import load
from specformer_jax.nn.mesh import make_mesh
from specformer_jax.training import fit, metrics
from specformer_jax.training.config import TrainConfig
from specformer_jax.training.data.documents import Document

if reason := cpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
PROMPTS = [[1, 5, 9, 2], [7, 3], [11, 4, 4, 8, 1, 6], [2, 12, 40, 3, 9]]


def is_packed(x) -> bool:
    return isinstance(x, PackedMatrix)


@pytest.fixture(scope="module")
def native(tiny_target, tiny_head):
    return load(str(tiny_target), draft=str(tiny_head), dtype="bfloat16", lookup=False)


@pytest.fixture(scope="module")
def plain(tiny_target, tiny_head):
    with lowering_for("cpu", native=False):
        return load(str(tiny_target), draft=str(tiny_head), dtype="bfloat16", lookup=False)


def test_what_is_multiplied_is_packed_once(native, plain):
    packed = jax.tree.leaves_with_path(native.params, is_leaf=is_packed)
    kept = jax.tree.leaves(plain.params)
    assert len(packed) == len(kept)
    names = {jax.tree_util.keystr(path) for path, leaf in packed if is_packed(leaf)}
    layer = native.params["target"]["layer_0"]
    assert is_packed(layer["attention"]["qkv"]["kernel"]) and is_packed(layer["attention"]["out"]["kernel"])
    assert is_packed(layer["ffn"]["gate_up"]) and is_packed(layer["ffn"]["down"])
    assert len([name for name in names if "target" in name]) == 4 * native.config.layers
    drafter = {name.split("'")[3] for name in names if "draft" in name}
    assert drafter == {"context_attention", "downsampler", "slots", "block_0"}
    assert not any("norm" in name or "embedding" in name or "bias" in name for name in names)
    for (_, leaf), array in zip(packed, kept, strict=True):
        assert leaf.shape == array.shape
        if not is_packed(leaf):
            assert (leaf == array).all()


def test_weights_come_out_of_the_panels_as_they_went_in(native, plain):
    kernel = native.params["target"]["layer_1"]["ffn"]["down"]
    assert (unpack(kernel) == plain.params["target"]["layer_1"]["ffn"]["down"]).all()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_training_takes_a_model_that_was_loaded_for_decoding(native, plain, tmp_path):
    draft = DraftConfig(max_draft_length=2, next_token_hook=True)
    documents = [Document.of(str(i), range(i, i + 4), range(i + 4, i + 20)) for i in range(8)]
    config = TrainConfig(draft=draft, sequence_length=32, batch_rows=2, anchors=24, steps=2, init="target", log_every=1)
    for name, lm in (("native", native), ("plain", plain)):
        inputs = fit.Inputs(lm.config, lm.params["target"], documents)
        with lowering_for("cpu", native=False):
            fit.fit(config.bind(lm.config), inputs, tmp_path / name, progress=False)
    losses = [[row["loss"] for row in metrics.read(tmp_path / name / "metrics.jsonl")] for name in ("native", "plain")]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_logits_agree_with_the_reference(native, plain):
    tokens = jnp.array(PROMPTS[2])[None]
    run = jax.jit(lambda params, tokens: native.model.target.apply({"params": params["target"]}, tokens).hooks)
    with lowering_for("cpu", native=False):
        expected = run(plain.params, tokens)
    got = run(native.params, tokens)
    got, expected = (np.asarray(x, np.float32).reshape(-1, x.shape[-1]) for x in (got, expected))
    error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 0.02  # a few roundings to bfloat16 of 2^-9 each


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_bfloat16_answers_do_not_depend_on_the_budget_or_the_batch(native, temperature):
    sampling_params = SamplingParams(max_new_tokens=24, temperature=temperature, seed=3)

    def answers(k, batch_size):
        found = dict(generate_ids(native, PROMPTS, sampling_params, draft_length=k, batch_size=batch_size))
        return [found[i].token_ids for i in range(len(PROMPTS))]

    expected = answers(0, 4)
    assert answers(3, 4) == expected
    assert answers(2, 2) == expected


def test_float32_and_larger_meshes_keep_plain_arrays(tiny_target):
    lm = load(str(tiny_target), draft="none", dtype="float32")
    assert not any(map(is_packed, jax.tree.leaves(lm.params, is_leaf=is_packed)))
    assert packing.packs("bfloat16", None) and packing.packs("bfloat16", types.SimpleNamespace(size=1))
    assert not packing.packs("bfloat16", types.SimpleNamespace(size=2))


def test_a_mesh_of_one_device_is_one_cpu(tiny_target):
    lm = load(str(tiny_target), draft="none", dtype="bfloat16", mesh=make_mesh())
    assert any(map(is_packed, jax.tree.leaves(lm.params, is_leaf=is_packed)))


def test_without_native_bodies_a_warning_says_what_it_costs(tiny_target, monkeypatch, caplog):
    find = importlib.util.find_spec
    hide = lambda name, *rest: None if name == "pallas_kernels.cpu._native" else find(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    cpu._load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            lm = load(str(tiny_target), draft="none", dtype="bfloat16")
            load(str(tiny_target), draft="none", dtype="float32")
    finally:
        cpu._load.cache_clear()
    assert not any(map(is_packed, jax.tree.leaves(lm.params, is_leaf=is_packed)))
    assert [record.message for record in caplog.records if "twice as long" in record.message] == [
        "decoding in bfloat16 takes about twice as long as it could: native bodies were not built; install with a C++"
        " compiler at hand, `pip install -v` shows what it says"
    ]
