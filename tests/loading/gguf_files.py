"""GGUF files as llama.cpp's converter writes them, from Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

from specformer_jax.loading.target_config import read_config

Q = gguf.GGMLQuantizationType


def write_gguf(
    folder: Path, file: Path, kind: Q = Q.F32, extra: dict | None = None, blocks: dict | None = None
) -> Path:
    """The Hugging Face model in `folder` as llama.cpp's converter writes it; matrices quantised to `kind`.

    `blocks` are raw quantised matrices by their GGUF name, taken in place of the model's.
    """
    config, stored = read_config(folder), load_file(folder / "model.safetensors")
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == config.architecture)
    names = gguf.get_tensor_name_map(architecture, config.layers)
    writer = gguf.GGUFWriter(file, config.architecture)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_epsilon)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    for name, value in stored.items():
        value = value.astype(np.float32)
        name_in_gguf = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name_in_gguf in (blocks or {}):
            writer.add_tensor(name_in_gguf, blocks[name_in_gguf][0], raw_dtype=blocks[name_in_gguf][1])
            continue
        if config.architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            value = _permute(value, config.head_size)
        if value.ndim == 1 or kind == Q.F32:
            writer.add_tensor(name_in_gguf, value)
        else:
            writer.add_tensor(name_in_gguf, gguf.quantize(value, kind), raw_dtype=kind)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _permute(value: np.ndarray, head_size: int) -> np.ndarray:
    """llama.cpp's order of the rows of a Llama query or key matrix (`LlamaModel.permute`)."""
    return value.reshape(-1, 2, head_size // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
