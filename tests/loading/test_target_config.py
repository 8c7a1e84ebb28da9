"""config.json of transformers 4 and 5 -> TargetConfig, or one sentence that says why not."""

from __future__ import annotations

import json

import pytest

from specformer_jax.config import RopeScaling, TargetConfig
from specformer_jax.errors import UserError
from specformer_jax.loading import weights
from specformer_jax.loading.target_config import read_config
from tests.loading.broken import ODD_VALUES, edit_config, edit_json


def test_rope_of_transformers_4_and_5(model):
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 32
    edit_config(model, rope_parameters=llama3 | {"rope_theta": 5e5})
    five = read_config(model)
    assert (five.rope_theta, five.rope_scaling) == (5e5, RopeScaling(8.0, 1.0, 4.0, 32))
    edit_config(model, rope_parameters=None, rope_scaling=llama3, rope_theta=5e5)
    assert read_config(model) == five
    edit_config(model, rope_scaling=None)
    assert read_config(model).rope_scaling is None


def test_end_tokens(model):
    """generation_config.json says how an answer ends; config.json only where that does not."""
    assert read_config(model).eos_ids == (2, 3)
    edit_config(model, eos_token_id=7)
    assert read_config(model).eos_ids == (2, 3)
    (model / "generation_config.json").unlink()
    assert read_config(model).eos_ids == (7,)
    edit_config(model, eos_token_id=None)
    assert read_config(model).eos_ids == ()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gemma3"}, "'gemma3' model: this project runs llama, qwen2, qwen3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rotary scaling 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling 'linear'"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64}, "sliding window"),
        (
            {"layer_types": ["full_attention", "linear_attention"]},
            "must be full_attention or sliding_attention, one for",
        ),
        ({"layer_types": ["full_attention"]}, "one for each layer"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized safetensors"),
        ({"num_attention_heads": 3}, "3 query heads are no multiple of 4"),
    ],
)
def test_refused_configurations(changes, sentence, model):
    edit_config(model, **changes)
    with pytest.raises(UserError, match=sentence):
        read_config(model)


def test_sliding_window_that_no_layer_uses(model):
    """Qwen2 checkpoints name a window and switch it off, or begin it past their last layer."""
    edit_config(model, use_sliding_window=False, sliding_window=64, max_window_layers=0)
    read_config(model)
    edit_config(model, use_sliding_window=True, max_window_layers=2)
    read_config(model)
    edit_config(model, layer_types=["full_attention", "full_attention", "sliding_attention"])
    read_config(model)


def test_what_transformers_loads_loads(model):
    """Null is absent, and swish is another name of silu."""
    wanted = read_config(model)
    nothing = ("quantization_config", "attention_bias", "mlp_bias", "head_dim", "layer_types", "use_sliding_window")
    edit_config(
        model, hidden_act="swish", **dict.fromkeys((*nothing, "max_window_layers", "sliding_window", "rope_scaling"))
    )
    assert read_config(model) == wanted


def test_lacking_key(model):
    config = json.loads((model / "config.json").read_text())
    del config["hidden_size"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json lacks 'hidden_size'"):
        read_config(model)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ends", ["</s>", -1, 96, 10**40, 2.0, True, [2, "</s>"], [[2]], {"id": 2}])
def test_end_tokens_that_are_none(file, ends, model):
    if file == "config.json":
        (model / "generation_config.json").unlink()
    edit_json(model / file, eos_token_id=ends)
    with pytest.raises(UserError, match="none of the model's 96 token ids: correct its eos_token_id"):
        read_config(model)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_files_that_hold_something_else(file, model):
    content = (model / file).read_text()
    for odd in ("[]", "3", "null", '"text"', "", "{", "[" * 100_000, content[: len(content) // 2]):
        (model / file).write_text(odd)
        with pytest.raises(UserError, match=f"{file} (is not valid JSON|holds no JSON object)"):
            read_config(model)
    (model / file).write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=f"{file} is not valid JSON"):
        read_config(model)
    (model / file).unlink()
    (model / file).mkdir()
    with pytest.raises(UserError, match=f"{file} cannot be read"):
        read_config(model)


def test_odd_values_anywhere(model):
    """Each key with each odd value: a configuration whose parameters have shapes, or one sentence."""
    stored = json.loads((model / "config.json").read_text())
    rope = stored["rope_parameters"] | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    variants = [stored | {key: value} for key in stored for value in ODD_VALUES]
    variants += [stored | {"rope_parameters": rope | {key: value}} for key in rope for value in ODD_VALUES]
    loaded = 0
    for variant in variants:
        (model / "config.json").write_text(json.dumps(variant))
        try:
            config = read_config(model)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert isinstance(config, TargetConfig)
        if variant["num_hidden_layers"] == stored["num_hidden_layers"] and loaded % 10 == 0:
            weights.abstract_params(config)
        loaded += 1
    assert 0 < loaded < len(variants)
