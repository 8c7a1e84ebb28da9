"""Target weights: a Hugging Face directory, a Hub id, a GGUF file or the built-in model -> parameters.

Tensors are read one at a time and placed straight into their sharding, so the host never holds more than the model
and one tensor.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from pallas_kernels import PackedMatrix, pack_four_bits, packs_four_bits
from pallas_kernels.product import four_bits
from specformer_jax import files
from specformer_jax.config import TargetConfig
from specformer_jax.errors import UserError
from specformer_jax.loading import fetch, packing
from specformer_jax.loading.gguf_reader import open_gguf
from specformer_jax.nn.mesh import without_mesh
from specformer_jax.nn.target import Target

# Each parameter of a layer: the stored tensors it is made of, and where each goes. Stored linear weights are
# [outputs, inputs]. Letters: d width, k key/value heads, g queries per key/value head, n heads, h head size, f ffn.
_ALL = ...
_QUERIES, _KEYS, _VALUES = np.s_[..., :-2, :], np.s_[..., -2, :], np.s_[..., -1, :]
LAYER: dict[str, list[tuple[str, str, Any]]] = {
    "attention_norm/scale": [("input_layernorm.weight", "d -> d", _ALL)],
    "attention/qkv/kernel": [
        ("self_attn.q_proj.weight", "(k g h) d -> d k g h", _QUERIES),
        ("self_attn.k_proj.weight", "(k h) d -> d k h", _KEYS),
        ("self_attn.v_proj.weight", "(k h) d -> d k h", _VALUES),
    ],
    "attention/qkv/bias": [
        ("self_attn.q_proj.bias", "(k g h) -> k g h", _QUERIES),
        ("self_attn.k_proj.bias", "(k h) -> k h", _KEYS),
        ("self_attn.v_proj.bias", "(k h) -> k h", _VALUES),
    ],
    "attention/qkv/q_norm/scale": [("self_attn.q_norm.weight", "h -> h", _ALL)],
    "attention/qkv/k_norm/scale": [("self_attn.k_norm.weight", "h -> h", _ALL)],
    "attention/out/kernel": [("self_attn.o_proj.weight", "d (n h) -> n h d", _ALL)],
    "ffn_norm/scale": [("post_attention_layernorm.weight", "d -> d", _ALL)],
    "ffn/gate_up": [
        ("mlp.gate_proj.weight", "f d -> d f", np.s_[:, 0]),
        ("mlp.up_proj.weight", "f d -> d f", np.s_[:, 1]),
    ],
    "ffn/down": [("mlp.down_proj.weight", "d f -> f d", _ALL)],
}
_OUTER: dict[str, list[tuple[str, str, Any]]] = {
    "embedding": [("model.embed_tokens.weight", "v d -> v d", _ALL)],
    "final_norm/scale": [("model.norm.weight", "d -> d", _ALL)],
    "lm_head": [("lm_head.weight", "v d -> v d", _ALL)],
}

# Safetensors' names; what is narrower needs scales to mean anything. A vocabulary's map is of whole numbers.
_READ_AS_STORED = ("F64", "F32", "F16", "BF16")
_WHOLE_NUMBERS = ("I64", "I32")


def resolve(spec: str) -> Path:
    """Where the model that a user names is, downloading it first where needed.

    Args:
      spec: "smollm2-135m", a directory, a .gguf file, or a Hub id "organisation/name".

    Raises:
      UserError: none of these, or the download failed.
    """
    path = Path(spec).expanduser()
    if spec == fetch.BUILTIN:
        return fetch.builtin_gguf()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path.resolve()
    if not path.exists() and path.suffix != ".gguf" and fetch.is_hub_id(spec):
        return fetch.hub_snapshot(spec)
    raise UserError(
        f"no model at {spec!r}: name {fetch.BUILTIN}, a directory with config.json, a .gguf file or a Hub id like"
        " organisation/name"
    )


def load_params(
    path: Path, config: TargetConfig, dtype: str, shardings: Any = None, *, pack: bool = False
) -> dict[str, Any]:
    """Reads the parameters of `Target(config)`.

    Args:
      path: where `resolve` found the model.
      config: what `target_config.read_config` read there.
      dtype: "bfloat16" or "float32"; every parameter is cast to it.
      shardings: a tree of `jax.sharding.Sharding` like the result (`mesh.param_shardings` of `boxed_params`), or None
        for the default device.
      pack: store what a CPU's native product multiplies as `PackedMatrix` (bfloat16 on one device): in the four bits of
        a GGUF file's Q4_0 or Q4_1 where that is faster, with the results of bfloat16.

    Returns:
      The tree `Target.init` makes, unboxed: fused qkv [D, K, N/K + 2, H], attention output [N, H, D], gate_up
      [D, 2, F], down [F, D], embedding [V, D], lm_head [V, D] where it is not tied.

    Raises:
      UserError: a missing or truncated file, a missing tensor, one of another shape, or one this model has no use for.
    """
    checkpoint: Checkpoint = open_gguf(path) if path.suffix == ".gguf" else Safetensors(path)
    expected: dict[str, Any] = traverse_util.flatten_dict(abstract_params(config), sep="/")
    placed: dict[str, Any] = traverse_util.flatten_dict(shardings, sep="/") if shardings is not None else {}
    _check_unused(checkpoint, expected)
    params: dict[str, Any] = {}
    sizes = sizes_of(config)
    for name, leaf in expected.items():
        if pack and (in_four_bits := _in_four_bits(checkpoint, name, leaf.shape, config)) is not None:
            params[name] = in_four_bits
            continue
        host = np.empty(leaf.shape, numpy_dtype(dtype))
        for tensor, layout, place in _sources(name):
            fill(host[place], checkpoint.read(tensor, config), layout, sizes, tensor)
        packed = packing.packed(name, host) if pack else None
        params[name] = _put(host, placed.get(name)) if packed is None else packed
        del host
    return traverse_util.unflatten_dict(params, sep="/")


def boxed_params(config: TargetConfig) -> dict[str, Any]:
    """The target's parameter tree as shapes f32 with their logical axes, without making it."""
    # One layer is traced and stands for all: tracing thirty takes a second.
    module = Target(dataclasses.replace(config, layers=1), dtype="float32")
    with without_mesh():
        params = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), "int32"))["params"]
    return params | {f"layer_{i}": params["layer_0"] for i in range(config.layers)}


def abstract_params(config: TargetConfig) -> dict[str, Any]:
    """The shapes of the target's parameters, as a tree of `jax.ShapeDtypeStruct` in float32."""
    return nn.meta.unbox(boxed_params(config))


class Checkpoint(Protocol):
    """Stored tensors under their Hugging Face names."""

    path: Path

    def read(self, name: str, config: TargetConfig) -> np.ndarray: ...

    def read_blocks(self, name: str, config: TargetConfig) -> np.ndarray | None: ...

    def names(self) -> list[str]: ...

    @staticmethod
    def stored_name(name: str) -> str: ...


class Safetensors:
    """The safetensors files of a Hugging Face directory: one, or many with an index.

    Raises:
      UserError: none there, or one that the index names is missing or truncated.
    """

    def __init__(self, path: Path):
        self.path = path
        index = path / "model.safetensors.index.json"
        self._file_of = {}
        for file in _listed(index) if index.exists() else ["model.safetensors"]:
            for name in self._open(path / file).keys():  # noqa: SIM118
                self._file_of[name] = path / file

    def names(self) -> list[str]:
        return list(self._file_of)

    @staticmethod
    def stored_name(name: str) -> str:
        return name

    def read(self, name: str, config: TargetConfig) -> np.ndarray:
        """One tensor as stored."""
        if name not in self._file_of:
            raise UserError(f"{self.path} has no tensor {name}: it is incomplete or of another architecture")
        file = self._open(self._file_of[name])
        if (kind := file.get_slice(name).get_dtype()) not in (*_READ_AS_STORED, *_WHOLE_NUMBERS):
            raise UserError(
                f"{self.path} stores {name} as {kind}: this project reads {', '.join(_READ_AS_STORED)} safetensors, so"
                " take the model's unquantised weights or a GGUF file"
            )
        return file.get_tensor(name)

    def read_blocks(self, name: str, config: TargetConfig) -> np.ndarray | None:
        """None: no such file holds weights in four bits."""
        return None

    @staticmethod
    def _open(file: Path):
        try:
            return safe_open(file, framework="numpy")
        except FileNotFoundError as error:
            raise UserError(
                f"{file} is missing: the download is incomplete, or the weights are not safetensors"
            ) from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is truncated or no safetensors file ({error}): download it again") from error


def _listed(index: Path) -> list[str]:
    """The files that an index spreads the tensors over."""
    weight_map = files.read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensors to files: download it again")
    return sorted(set(weight_map.values()))


def _sources(name: str) -> list[tuple[str, str, Any]]:
    """The stored tensors of a parameter: their names, layouts, and places in it."""
    if not name.startswith("layer_"):
        return _OUTER[name]
    layer, _, part = name.partition("/")
    prefix = f"model.layers.{layer.removeprefix('layer_')}."
    return [(prefix + tensor, layout, place) for tensor, layout, place in LAYER[part]]


def _in_four_bits(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], config: TargetConfig
) -> PackedMatrix | None:
    """A parameter as the file's own blocks of four bits, where it has them and the native product gains by them."""
    axes = packing.input_axes(name)
    if axes is None or not packs_four_bits() or shape[axes - 1] % four_bits.INPUTS:
        return None
    host = np.empty((*shape[: axes - 1], shape[axes - 1] // four_bits.INPUTS, *shape[axes:]), four_bits.BLOCK)
    sizes = sizes_of(config)
    for tensor, layout, place in _sources(name):
        blocks = checkpoint.read_blocks(tensor, config)
        if blocks is None:
            return None
        inputs = layout.split(" -> ")[0].rstrip(")")[-1]  # the innermost axis as stored, which the blocks divide
        fill(host[place], blocks, layout, sizes | {inputs: sizes[inputs] // four_bits.INPUTS}, tensor)
    return pack_four_bits(host, axes)


def sizes_of(c: TargetConfig) -> dict[str, int]:
    """What the letters of a layout stand for."""
    sizes = {"d": c.width, "k": c.kv_heads, "g": c.heads // c.kv_heads, "n": c.heads, "h": c.head_size}
    return sizes | {"f": c.ffn, "v": c.vocab_size}


def fill(out: np.ndarray, stored: np.ndarray, layout: str, sizes: dict[str, int], name: str) -> None:
    """Casts a stored tensor into its place, axes moved as the layout says ("(k h) d -> d k h").

    Raises:
      UserError: it has another shape.
    """
    given, wanted = layout.split(" -> ")
    axes = given.replace("(", "").replace(")", "").split()
    groups = [group.strip("()").split() for group in re.findall(r"\(.*?\)|\w", given)]
    shape = tuple(int(np.prod([sizes[axis] for axis in group])) for group in groups)
    if stored.shape != shape:
        raise UserError(f"tensor {name} has shape {stored.shape}, but the configuration asks for {shape}")
    split = stored.reshape([sizes[axis] for axis in axes])
    out[...] = split.transpose([axes.index(axis) for axis in wanted.split()])


def _put(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        array = jax.device_put(host)
    else:  # every process cuts out what its own devices hold
        array = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    return array.block_until_ready()  # so that the host copy goes before the next tensor is read


def _check_unused(checkpoint: Checkpoint, expected: dict[str, Any]) -> None:
    """A layer's tensor that no parameter takes is a variant we would silently run wrong."""
    used = {checkpoint.stored_name(tensor) for name in expected for tensor, _, _ in _sources(name)}
    for name in checkpoint.names():
        if re.match(r"model\.layers\.|blk\.", name) and name not in used and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{checkpoint.path} holds {name}, which a decoder of this configuration does not have")


def numpy_dtype(dtype: str) -> np.dtype:
    """numpy's dtype of "bfloat16" or "float32"."""
    return np.dtype({"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype])
