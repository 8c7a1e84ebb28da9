"""GGUF files: metadata as a TargetConfig, tensors dequantised under their Hugging Face names.

Layout and key names: llama.cpp's `convert_hf_to_gguf.py` and the `gguf` package.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from specformer_jax.config import ARCHITECTURES, RopeScaling, TargetConfig, UserError

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@functools.lru_cache(maxsize=1)
def open_gguf(path: Path) -> GGUFFile:
    """The file at `path`; config, tokenizer and weights read the same one, and its vocabulary takes long to parse."""
    return GGUFFile(path)


class GGUFFile:
    """A memory-mapped GGUF file.

    Raises:
      UserError: it is not a GGUF file, or it ends early.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise UserError(
                f"{path} is not a readable GGUF file, or it is truncated ({error}): download it again"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as Python numbers, strings and lists."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def config(self) -> TargetConfig:
        """The model this file holds.

        Raises:
          UserError: an architecture or a variant this project does not run, or a missing key.
        """
        architecture = self.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise UserError(
                f"{self.path.name} holds a {architecture!r} model: this project runs {', '.join(ARCHITECTURES)} decoders"
            )

        def read(key, *default):
            value = self.get(f"{architecture}.{key}", *default)
            if value is None or isinstance(value, list):
                raise UserError(f"{self.path.name} has no single {architecture}.{key} in its metadata")
            return value

        if read("expert_count", 0):
            raise UserError(f"{self.path.name} is a mixture of experts: this project runs dense decoders only")
        if (scaling := read("rope.scaling.type", "none")) != "none":
            raise UserError(f"{self.path.name} scales its rotary positions by {scaling!r}: only Llama-3.1's way is run")
        width, heads = read("embedding_length"), read("attention.head_count")
        head_size = read("attention.key_length", width // heads)
        if not head_size == read("rope.dimension_count", head_size) == read("attention.value_length", head_size):
            raise UserError(f"{self.path.name} rotates only a part of each head, or its values are of another size")
        theta = float(read("rope.freq_base", 10000.0))
        ends = (self.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        return TargetConfig(
            architecture=architecture,
            vocab_size=self._tensor("token_embd.weight").data.shape[0],
            width=width,
            layers=read("block_count"),
            heads=heads,
            kv_heads=read("attention.head_count_kv", heads),
            head_size=head_size,
            ffn=read("feed_forward_length"),
            context=read("context_length"),
            rope_theta=theta,
            rope_scaling=self._rope_scaling(head_size, theta),
            rms_epsilon=read("attention.layer_norm_rms_epsilon"),
            qkv_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            tied_embeddings="output.weight" not in self._tensors,
            eos_ids=tuple(sorted({end for end in ends if end is not None})),
        )

    def names(self) -> list[str]:
        """The stored tensors' own names."""
        return list(self._tensors)

    def stored_name(self, name: str) -> str:
        """A Hugging Face tensor name -> the name in this file.

        >>> GGUFFile.stored_name(None, "model.layers.3.mlp.up_proj.weight")
        'blk.3.ffn_up.weight'
        """
        stem, _, kind = name.rpartition(".")
        if not stem.startswith("model.layers."):
            return f"{_NAMES[stem]}.{kind}"
        index, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{index}.{_LAYER_NAMES[part]}.{kind}"

    def read(self, name: str, config: TargetConfig) -> np.ndarray:
        """One tensor, dequantised, in the orientation and row order of the Hugging Face checkpoint.

        Args:
          name: Hugging Face tensor name.

        Returns:
          f32, outputs first.

        Raises:
          UserError: the tensor is missing, or its quantisation is unknown to the `gguf` package.
        """
        stored = self._tensor(self.stored_name(name))
        try:
            values = gguf.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise UserError(f"{stored.name} of {self.path.name} is stored as {stored.tensor_type.name}: unknown") from error
        if config.architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            # llama.cpp interleaves the two rotary halves of each Llama head; Hugging Face keeps them apart.
            pairs = values.reshape(-1, config.head_size // 2, 2, *values.shape[1:])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        return values

    def _tensor(self, stored_name: str) -> gguf.ReaderTensor:
        if stored_name not in self._tensors:
            raise UserError(f"{self.path.name} has no tensor {stored_name}: it is incomplete or of another architecture")
        return self._tensors[stored_name]

    def _rope_scaling(self, head_size: int, theta: float) -> RopeScaling | None:
        """Llama-3.1 scaling is stored as divisors of the rotary frequencies; find the settings that give them."""
        if "rope_freqs.weight" not in self._tensors:
            return None
        stored = np.asarray(self._tensors["rope_freqs.weight"].data, np.float32)
        scaling = RopeScaling(float(stored.max()), 1.0, 4.0, 8192)  # all that Llama 3.1 to 3.3 vary is the factor
        wavelength = 2 * np.pi * theta ** (np.arange(0, head_size, 2) / head_size)
        smooth = np.clip((scaling.original_context / wavelength - 1) / 3, 0, 1)
        if not np.allclose(stored, 1 / ((1 - smooth) / scaling.factor + smooth), rtol=1e-3):
            raise UserError(f"{self.path.name} scales its rotary positions in another way than Llama-3.1")
        return scaling
