"""GGUF files: metadata as a TargetConfig, tensors dequantised under their Hugging Face names.

Layout and key names: llama.cpp's `convert_hf_to_gguf.py` and the `gguf` package.
"""

from __future__ import annotations

import functools
import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape

from pallas_kernels.product import four_bits
from specformer_jax.config import ARCHITECTURES, RopeScaling, TargetConfig
from specformer_jax.errors import UserError

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
# A GGUF file names one or two tokens that end an answer; the chat models' generation_config.json also names these.
_END_TOKENS = {
    "llama-bpe": ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    "qwen2": ("<|endoftext|>", "<|im_end|>"),
}


@functools.lru_cache(maxsize=1)
def open_gguf(path: Path) -> GGUFFile:
    """The file at `path`; config, tokenizer and weights read the same one, and its vocabulary takes long to parse."""
    return GGUFFile(path)


class GGUFFile:
    """A memory-mapped GGUF file, or one in parts (name-00001-of-00003.gguf, ...), any of which names it.

    Raises:
      UserError: it is not a GGUF file, it ends early, or a part is missing.
    """

    def __init__(self, path: Path):
        self.path, *others = _parts(path)
        self._metadata, self._tensors = _parse_file(self.path)
        if self.get("split.count", 1) != 1 + len(others):
            raise UserError(f"{self.path} is one of {self.get('split.count')} parts, but its name does not say which")
        for other in others:
            self._tensors |= _parse_file(other)[1]

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as Python numbers, strings and lists."""
        return self._metadata.get(key, default)

    def config(self) -> TargetConfig:
        """The model this file holds.

        Raises:
          UserError: an architecture or a variant this project does not run, or a missing key.
        """
        architecture = self.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise UserError(
                f"{self.path.name} holds a {architecture!r} model: this project runs {', '.join(ARCHITECTURES)}"
            )

        def read(key, default=None):
            value = self.get(f"{architecture}.{key}", default)
            if type(value) not in (int, float) or not (0 < value < 1e30 or value == default):
                raise UserError(f"{self.path.name} has no single number {architecture}.{key} in its metadata")
            return value

        if read("expert_count", 0):
            raise UserError(f"{self.path.name} is a mixture of experts: this project runs dense decoders only")
        if (scaling := self.get(f"{architecture}.rope.scaling.type", "none")) != "none":
            raise UserError(f"{self.path.name} scales its rotary positions by {scaling!r}: only Llama-3.1's way is run")
        width, heads = read("embedding_length"), read("attention.head_count")
        head_size = read("attention.key_length", max(width // heads, 1))
        if not head_size == read("rope.dimension_count", head_size) == read("attention.value_length", head_size):
            raise UserError(f"{self.path.name} rotates only a part of each head, or its values are of another size")
        # Stored as float32: 1e-05 comes back as 9.999999747378752e-06 unless its shortest form is taken.
        theta, epsilon = (
            float(str(np.float32(value)))
            for value in (read("rope.freq_base", 10000.0), read("attention.layer_norm_rms_epsilon"))
        )
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
            rms_epsilon=epsilon,
            qkv_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            tied_embeddings="output.weight" not in self._tensors,
            eos_ids=self._eos_ids(),
        )

    def _eos_ids(self) -> tuple[int, ...]:
        ends = [self.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        names = _END_TOKENS.get(self.get("tokenizer.ggml.pre"), ())
        ends += [i for i, token in enumerate(self.get("tokenizer.ggml.tokens", ()) if names else ()) if token in names]
        return tuple(sorted({token for token in ends if type(token) is int}))

    def names(self) -> list[str]:
        """The stored tensors' own names."""
        return list(self._tensors)

    @staticmethod
    def stored_name(name: str) -> str:
        """A Hugging Face tensor name -> the name in this file.

        >>> GGUFFile.stored_name("model.layers.3.mlp.up_proj.weight")
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
          name: the tensor's name in a Hugging Face checkpoint.

        Returns:
          Its values as f32, the output axis first.

        Raises:
          UserError: the tensor is missing, or its quantisation is unknown to the `gguf` package.
        """
        stored = self._tensor(self.stored_name(name))
        try:
            values = gguf.dequantize(stored.data, stored.type)
        except NotImplementedError as error:
            raise UserError(f"{self.path.name} stores {name} as {stored.type.name}, which cannot be read") from error
        return _reordered(values, name, config)

    def read_blocks(self, name: str, config: TargetConfig) -> np.ndarray | None:
        """A matrix in four bits as the file stores it, in the orientation and row order of `read`.

        Returns:
          four_bits.BLOCK[outputs, inputs / 32]; None if the file stores it in another way.
        """
        stored = self._tensor(self.stored_name(name))
        if stored.type == gguf.GGMLQuantizationType.Q4_1:
            blocks = stored.data.view(four_bits.BLOCK)
        elif stored.type == gguf.GGMLQuantizationType.Q4_0:  # (q - 8) * scale
            given = stored.data.view(_Q4_0)
            blocks = np.empty(given.shape, four_bits.BLOCK)
            blocks["scale"], blocks["q"] = given["scale"], given["q"]
            with np.errstate(over="ignore"):
                blocks["least"] = given["scale"] * np.float16(-8)
        else:
            return None
        if not (np.isfinite(blocks["scale"]).all() and np.isfinite(blocks["least"]).all()):
            return None
        return _reordered(blocks, name, config)

    def _tensor(self, stored_name: str) -> StoredTensor:
        if stored_name not in self._tensors:
            raise UserError(f"{self.path.name} has no tensor {stored_name}: it is incomplete or of another kind")
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


def _reordered(rows: np.ndarray, name: str, config: TargetConfig) -> np.ndarray:
    """llama.cpp interleaves the two rotary halves of each Llama head; Hugging Face keeps them apart."""
    if config.architecture != "llama" or not ("q_proj" in name or "k_proj" in name):
        return rows
    pairs = rows.reshape(-1, config.head_size // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _parts(path: Path) -> list[Path]:
    """The files that hold the model: the one named, or all the parts that its name counts."""
    found = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.gguf", path.name)
    if found is None:
        return [path]
    stem, _, count = found.groups()
    parts = [path.with_name(f"{stem}{i + 1:05}-of-{count}.gguf") for i in range(int(count))]
    for part in parts:
        if not part.exists():
            raise UserError(f"{part} is missing: the model is in {int(count)} parts, which belong into one directory")
    return parts or [path]


def _parse_file(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    try:
        return _parse(path)
    # A damaged file asks for numbers, sizes and kinds of any sort.
    except (ValueError, TypeError, ArithmeticError, struct.error, OSError, MemoryError, RecursionError) as error:
        raise UserError(f"{path} is no GGUF file or is truncated ({error}): download it again") from error


class StoredTensor(NamedTuple):
    """A tensor as it lies in the file: [rows, ...], floats or blocks of quantised bytes."""

    data: np.ndarray
    type: gguf.GGMLQuantizationType


_Q4_0 = np.dtype([(name, four_bits.BLOCK[name]) for name in ("scale", "q")])
_FLOATS = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
_SCALARS = {  # GGUF value type -> struct format
    gguf.GGUFValueType.UINT8: "B",
    gguf.GGUFValueType.INT8: "b",
    gguf.GGUFValueType.UINT16: "H",
    gguf.GGUFValueType.INT16: "h",
    gguf.GGUFValueType.UINT32: "I",
    gguf.GGUFValueType.INT32: "i",
    gguf.GGUFValueType.FLOAT32: "f",
    gguf.GGUFValueType.BOOL: "?",
    gguf.GGUFValueType.UINT64: "Q",
    gguf.GGUFValueType.INT64: "q",
    gguf.GGUFValueType.FLOAT64: "d",
}


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and tensors of a little-endian GGUF file, versions 2 and 3.

    `gguf.GGUFReader` does this too, but takes seconds for a vocabulary of 50,000 tokens (ten times as long).
    """
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    at = 4

    def take(format: str, count: int = 1):
        nonlocal at
        values = struct.unpack_from(f"<{count}{format}", data, at)
        at += struct.calcsize(format) * count
        return values

    def string() -> str:
        nonlocal at
        (length,) = take("Q")
        at += length
        return data[at - length : at].decode("utf-8")

    def value(kind: int):
        if kind == gguf.GGUFValueType.STRING:
            return string()
        if kind != gguf.GGUFValueType.ARRAY:
            return take(_SCALARS[gguf.GGUFValueType(kind)])[0]
        inner, count = take("I")[0], take("Q")[0]
        if inner in (gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY):
            return [value(inner) for _ in range(count)]
        return list(take(_SCALARS[gguf.GGUFValueType(inner)], count))

    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    (version,) = take("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not 2 or 3")
    tensor_count, key_count = take("Q", 2)
    metadata = {}
    for _ in range(key_count):
        key = string()
        metadata[key] = value(take("I")[0])
    headers = []
    for _ in range(tensor_count):
        name = string()
        shape = tuple(reversed(take("Q", take("I")[0])))
        headers.append((name, shape, gguf.GGMLQuantizationType(take("I")[0]), take("Q")[0]))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    begin = math.ceil(at / alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in headers:
        dtype = _FLOATS.get(kind, np.uint8)
        shape = shape if kind in _FLOATS else quant_shape_to_byte_shape(shape, kind)
        flat = np.frombuffer(data, dtype, count=math.prod(shape), offset=begin + offset)
        tensors[name] = StoredTensor(flat.reshape(shape), kind)
    return metadata, tensors
