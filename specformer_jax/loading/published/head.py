"""The weights of a published head, read into the parameters of its drafter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax import traverse_util

from specformer_jax.config import TargetConfig
from specformer_jax.drafters.base import Drafter
from specformer_jax.errors import UserError, require
from specformer_jax.loading.head_checkpoint import boxed_params_of
from specformer_jax.loading.published.description import Description, describe
from specformer_jax.loading.weights import LAYER, Safetensors, fill, numpy_dtype, sizes_of

# As `weights.LAYER`, by the names that a drafter has for its parameters. Letters beyond its own: i hooks, e the width
# of one, j the width of all.
_KEYS, _VALUES = np.s_[..., 0, :], np.s_[..., 1, :]
_OUTER: dict[str, list[tuple[str, str, Any]]] = {
    "fuse/kernel": [("fc.weight", "d (i e) -> i e d", ...)],
    "fuse/norm/scale": [("input_norm.weight", "j -> j", ...)],
    "final_norm/scale": [("norm.weight", "d -> d", ...)],
    "hidden_norm/scale": [("hidden_norm.weight", "d -> d", ...)],
}
_BOTH = {name: LAYER[name] for name in ("ffn_norm/scale", "ffn/gate_up", "ffn/down")}
_BOTH["out/kernel"] = LAYER["attention/out/kernel"]
_EAGLE = _BOTH | {
    "embedding_norm/scale": LAYER["attention_norm/scale"],
    "hidden_norm/scale": [("hidden_norm.weight", "d -> d", ...)],
    **{f"qkv/{part}": LAYER[f"attention/qkv/{part}"] for part in ("kernel", "bias", "q_norm/scale", "k_norm/scale")},
}
_DFLASH = _BOTH | {
    "attention_norm/scale": LAYER["attention_norm/scale"],
    "query/kernel": [("self_attn.q_proj.weight", "(k g h) d -> d k g h", ...)],
    "kv/kernel": [
        ("self_attn.k_proj.weight", "(k h) d -> d k h", _KEYS),
        ("self_attn.v_proj.weight", "(k h) d -> d k h", _VALUES),
    ],
    "q_norm/scale": LAYER["attention/qkv/q_norm/scale"],
    "k_norm/scale": LAYER["attention/qkv/k_norm/scale"],
}
# What a file may hold beside the parameters. t2d is d2t the other way round; the verifier's are the target's own.
_BESIDE = {"d2t", "t2d", "lm_head.weight", "embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight"}


class LoadedHead(NamedTuple):
    """A head whose weights were read, whoever wrote it.

    Attributes:
      drafter: what drafts with it.
      params: its parameters as numpy arrays in the compute dtype; DFlash's mask is not among them.
      vocab: what it has of "token_ids", "lm_head" and "embedding" in place of the target's, see `Model`.
      mask_token: the token whose embedding is the mask; None for EAGLE-3.
    """

    drafter: Drafter
    params: dict[str, Any]
    vocab: dict[str, np.ndarray]
    mask_token: int | None


def read(folder: Path, target: TargetConfig, dtype: str) -> LoadedHead:
    """Reads a published head for a target.

    Args:
      folder: config.json and safetensors.
      target: the target that it is to draft for.
      dtype: "bfloat16" or "float32".

    Raises:
      UserError: a head that this project does not run, or of another target; a missing or misshapen tensor.
    """
    about = describe(folder, target, dtype)
    checkpoint = Safetensors(folder)
    stored = {name.removeprefix("model."): name for name in checkpoint.names()}
    tensors = _Tensors(folder, checkpoint, stored, about.decoder, dtype)
    expected: dict[str, Any] = traverse_util.flatten_dict(nn.unbox(boxed_params_of(about.drafter)), sep="/")
    expected.pop("mask", None)
    sources = {name: _sources(name, stored) for name in expected}
    used = {tensor for parts in sources.values() for tensor, _, _ in parts} | _BESIDE
    for name in stored:
        if name not in used and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{folder} holds {name}, which a head of its config.json does not have")
    sizes = sizes_of(about.decoder)
    groups = len(about.drafter.config.hook_layers)
    sizes |= {"i": groups, "e": about.decoder.width, "j": groups * about.decoder.width}
    params = {}
    for name, leaf in expected.items():
        # Beside each other: an EAGLE layer's queries, keys and values read the token and the hidden state.
        both = sizes | ({"d": 2 * sizes["d"]} if name == "qkv/kernel" else {})
        params[name] = np.empty(leaf.shape, numpy_dtype(dtype))
        for tensor, layout, place in sources[name]:
            tensors.into(params[name][place], tensor, layout, both)
    return LoadedHead(
        about.drafter, traverse_util.unflatten_dict(params, sep="/"), _vocab(about, tensors), about.mask_token
    )


class _Tensors:
    """The stored tensors by the names they have in either layout."""

    def __init__(
        self, folder: Path, checkpoint: Safetensors, stored: Mapping[str, str], decoder: TargetConfig, dtype: str
    ):
        self.folder, self.checkpoint, self.stored, self.decoder, self.dtype = folder, checkpoint, stored, decoder, dtype

    def read(self, name: str) -> np.ndarray:
        return self.checkpoint.read(self.stored.get(name, name), self.decoder)

    def into(self, out: np.ndarray, name: str, layout: str, sizes: dict[str, int]) -> None:
        fill(out, self.read(name), layout, sizes, name)

    def rows(self, name: str, count: int) -> np.ndarray:
        """A matrix of so many rows, as wide as the decoder."""
        out = np.empty((count, self.decoder.width), numpy_dtype(self.dtype))
        self.into(out, name, "v d -> v d", {"v": count, "d": self.decoder.width})
        return out


def _sources(name: str, stored: Mapping[str, str]) -> list[tuple[str, str, Any]]:
    """The stored tensors of a parameter: their names, layouts, and places in it."""
    if hook := re.fullmatch(r"fuse/norm_(\d+)/scale", name):
        return [(f"fc_norm.{hook[1]}.weight", "d -> d", ...)]
    eagle = next((prefix for prefix in ("midlayer.", "layers.0.") if f"{prefix}hidden_norm.weight" in stored), None)
    if eagle and name in _EAGLE:
        prefix, parts = eagle, _EAGLE[name]
    elif layer := re.fullmatch(r"layer_(\d+)/(.*)", name):
        prefix, parts = f"layers.{layer[1]}.", _DFLASH[layer[2]]
    else:
        prefix, parts = "", (_OUTER if name in _OUTER else _EAGLE)[name]
    return [(prefix + tensor, layout, place) for tensor, layout, place in parts]


def _vocab(about: Description, tensors: _Tensors) -> dict[str, np.ndarray]:
    """What the head has in place of the target's LM head and embedding."""
    vocab = {}
    if about.columns is not None:
        vocab["lm_head"] = tensors.rows("lm_head.weight", about.columns)
    if about.maps:
        offsets = tensors.read("d2t")
        require(
            (
                offsets.shape == (about.columns,) and offsets.dtype.kind == "i",
                f"{tensors.folder}: d2t must hold {about.columns} whole numbers",
            )
        )
        ids = np.arange(len(offsets)) + offsets  # d2t says how far each column's token lies past the column
        require(
            (
                bool((ids >= 0).all() and (ids < about.decoder.vocab_size).all()),
                f"{tensors.folder}: d2t leads out of the target's {about.decoder.vocab_size} tokens",
            )
        )
        vocab["token_ids"] = ids.astype(np.int32)
    if about.embeds:
        vocab["embedding"] = tensors.rows("embed_tokens.weight", about.decoder.vocab_size)
    return vocab
