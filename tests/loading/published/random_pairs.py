"""Random targets and heads as their authors' programs write them: config.json, safetensors, a word-level tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file

V, D, N, K, H, F, LAYERS = 64, 32, 4, 2, 16, 48, 4
DRAFT_IDS = (3, 5, 8, 13, 21, 34, 40, 55)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def decoder(model_type: str, **changes) -> dict:
    """The values of a decoder in config.json."""
    return {
        "model_type": model_type,
        "vocab_size": V,
        "hidden_size": D,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "intermediate_size": F,
        "num_hidden_layers": 1,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    } | changes


def target(folder: Path, model_type: str) -> Path:
    """A target whose answers wander among the tokens that the heads may draft."""
    random = np.random.default_rng(7)
    architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model_type]
    scaling = {"rope_scaling": LLAMA3} if model_type == "llama" else {}
    config = decoder(model_type, num_hidden_layers=LAYERS, eos_token_id=None, **scaling)
    tensors = {"model.embed_tokens.weight": random.normal(size=(V, D)), "model.norm.weight": scales(random, D)}
    for i in range(LAYERS):
        layer = attention(random, D, model_type == "qwen3") | ffn(random)
        tensors |= {f"model.layers.{i}.{name}": x for name, x in layer.items()}
        tensors[f"model.layers.{i}.input_layernorm.weight"] = scales(random, D)
    lm_head = random.normal(size=(V, D)) * 0.3
    lm_head[list(DRAFT_IDS)] *= 8
    save(folder, config | {"architectures": [architecture]}, tensors | {"lm_head.weight": lm_head})
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def eagle3(
    folder: Path, layout: str, model_type: str = "llama", hooks: Sequence[int] | None = None, **switches
) -> Path:
    """An EAGLE-3 head in the layout of "speculators" or "sglang", which drafts `DRAFT_IDS`; hooks as HS[i]."""
    random = np.random.default_rng(11)
    groups = len(hooks or (0, 0, 0))
    prefix = {"speculators": "layers.0.", "sglang": "midlayer."}[layout]
    layer = attention(random, 2 * D, model_type == "qwen3") | ffn(random)
    layer |= {"input_layernorm.weight": scales(random, D), "hidden_norm.weight": scales(random, D)}
    tensors = {prefix + name: x for name, x in layer.items()}
    tensors |= {"fc.weight": matrix(random, D, groups * D), "norm.weight": scales(random, D)}
    tensors["lm_head.weight"] = random.normal(size=(len(DRAFT_IDS), D))
    if switches.get("fc_norm"):
        tensors |= {f"fc_norm.{i}.weight": scales(random, D) for i in range(groups)}
    if switches.get("norm_before_fc"):
        tensors["input_norm.weight"] = scales(random, groups * D)
    if switches.get("embed_requires_grad"):
        tensors["embed_tokens.weight"] = random.normal(size=(V, D))
    values = decoder(model_type, rope_theta=500.0)
    if layout == "sglang":
        config = values | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": len(DRAFT_IDS)} | switches
        if hooks is not None:
            config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in hooks]}
    else:
        methods = [{"proposal_type": "greedy", "speculative_tokens": 3}]
        config = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_config": {"algorithm": "eagle3", "proposal_methods": methods},
            "transformer_layer_config": values,
            "draft_vocab_size": len(DRAFT_IDS),
            "norm_before_residual": False,
            "eagle_aux_hidden_state_layer_ids": hooks,
        } | switches
    save(folder, config, tensors | vocabulary_maps())
    return folder


def dflash(
    folder: Path,
    layout: str,
    hooks: Sequence[int] = (1, 2, 3),
    block: int = 6,
    layers: int = 2,
    layer: Mapping[str, Any] | None = None,
    nested: Mapping[str, Any] | None = None,
    **switches,
) -> Path:
    """A DFlash head in the layout of "speculators", with a vocabulary of its own, or "z-lab"; hooks as HS[i].

    `layer` goes to what describes the layers, `nested` into dflash_config, which z-lab's layout has.
    """
    random = np.random.default_rng(13)
    tensors = {"fc.weight": matrix(random, D, len(hooks) * D)}
    tensors |= {name: scales(random, D) for name in ("hidden_norm.weight", "norm.weight")}
    for i in range(layers):
        parts = attention(random, D, True) | ffn(random) | {"input_layernorm.weight": scales(random, D)}
        tensors |= {f"layers.{i}.{name}": x for name, x in parts.items()}
    values = decoder("qwen3", num_hidden_layers=layers, rope_theta=500.0, **(layer or {}))
    if layout == "z-lab":
        nested = {"mask_token_id": V - 1, "target_layer_ids": [i - 1 for i in hooks], **(nested or {})}
        config = values | {"architectures": ["DFlashDraftModel"], "block_size": block, "dflash_config": nested}
        save(folder, config | switches, tensors)
        return folder
    config = {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash",
        "transformer_layer_config": values,
        "aux_hidden_state_layer_ids": list(hooks),
        "block_size": block,
        "draft_vocab_size": len(DRAFT_IDS),
        "mask_token_id": V - 1,
        "sample_from_anchor": False,
    } | switches
    tensors |= {"lm_head.weight": random.normal(size=(len(DRAFT_IDS), D)), "embed_tokens.weight": np.zeros((V, D))}
    save(folder, config, tensors | vocabulary_maps())
    return folder


def vocabulary_maps() -> dict[str, np.ndarray]:
    """d2t and t2d of `DRAFT_IDS`."""
    ids = np.array(DRAFT_IDS)
    return {"d2t": ids - np.arange(len(ids)), "t2d": np.isin(np.arange(V), ids)}


def attention(random: np.random.Generator, inputs: int, qk_norm: bool) -> dict[str, np.ndarray]:
    sizes = {"q_proj": (N * H, inputs), "k_proj": (K * H, inputs), "v_proj": (K * H, inputs), "o_proj": (D, N * H)}
    tensors = {f"self_attn.{name}.weight": matrix(random, *size) for name, size in sizes.items()}
    norms = {f"self_attn.{name}.weight": scales(random, H) for name in ("q_norm", "k_norm")}
    return tensors | (norms if qk_norm else {})


def ffn(random: np.random.Generator) -> dict[str, np.ndarray]:
    sizes = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    tensors = {f"mlp.{name}.weight": matrix(random, *size) for name, size in sizes.items()}
    return tensors | {"post_attention_layernorm.weight": scales(random, D)}


def matrix(random: np.random.Generator, outputs: int, inputs: int) -> np.ndarray:
    return random.normal(size=(outputs, inputs)) * 1.5 / inputs**0.5


def scales(random: np.random.Generator, size: int) -> np.ndarray:
    return 1 + random.normal(size=size) * 0.2


def save(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> None:
    """Writes a folder, what is a float as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stored = {name: np.float32(x) if x.dtype.kind == "f" else x for name, x in tensors.items()}
    save_file({name: np.ascontiguousarray(x) for name, x in stored.items()}, folder / "model.safetensors")
