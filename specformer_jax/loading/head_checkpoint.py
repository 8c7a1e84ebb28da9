"""A draft head as a directory: `config.json` beside `head.safetensors`; training state lives elsewhere.

`config.json` holds the fields of `DraftConfig` and of the target the head was trained for; once `train.py evaluate
--record` has counted it, also `acceptance`, how often its drafts up to each position are all right, by which
`--draft-length auto` and the server's planner judge it before they have seen any. `head.safetensors` holds the head's
parameters under "draft/" with "/" between names, and "token_ids" i32[V'] when the draft vocabulary is pruned.
`config.json` also has the SHA-256 of the weights and of itself, which are compared when a head is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError

from specformer_jax import drafters, files
from specformer_jax.config import DraftConfig, TargetConfig
from specformer_jax.drafters.base import Drafter
from specformer_jax.errors import UserError, require
from specformer_jax.nn.mesh import without_mesh

FORMAT, VERSION = "specformer-head", 1
WEIGHTS = "head.safetensors"
TARGET_FIELDS = ("architecture", "vocab_size", "width", "layers", "heads", "kv_heads", "head_size")


def save_head(
    path: str | os.PathLike,
    draft_config: DraftConfig,
    target_config: TargetConfig,
    draft_params: Any,
    token_ids: np.ndarray | None = None,
    *,
    target_name: str | None = None,
    tokenizer: str | None = None,
    dtype: Any = jnp.bfloat16,
) -> None:
    """Writes a head that `load_head` reads back; one that is there already stays readable until the new one is whole.

    Args:
      path: a directory; made if it is not there.
      draft_config: the sizes and switches of the head; bound to the target before they are written.
      target_config: the target that the head drafts for.
      draft_params: the drafter's parameter tree, f32 or bf16.
      token_ids: i32[V'], the target's id of each column of a pruned draft vocabulary, or None.
      target_name: a name for people, such as "smollm2-135m".
      tokenizer: the fingerprint of the target's tokenizer, or None.
      dtype: the dtype in which the parameters are stored.

    Raises:
      UserError: the directory cannot be written.
    """
    path = Path(path)
    draft_config = draft_config.bind(target_config)
    tensors = {f"draft/{name}": np.asarray(x, dtype) for name, x in flatten_dict(draft_params, sep="/").items()}
    if token_ids is not None:
        tensors["token_ids"] = np.asarray(token_ids, np.int32)
    weights = safetensors.numpy.save(tensors)
    config = dataclasses.asdict(draft_config) | {
        "format": FORMAT,
        "version": VERSION,
        "target": {field: getattr(target_config, field) for field in TARGET_FIELDS},
        "target_name": target_name,
        "tokenizer": tokenizer,
        "weights": hashlib.sha256(weights).hexdigest(),
    }
    # The new config.json is what makes the new head one: until it is there, the old one has the weights it names.
    new = _new_weights(path, config["weights"])
    try:
        path.mkdir(parents=True, exist_ok=True)
        files.write_whole(new, weights)
        _write_config(path, config)
        new.replace(path / WEIGHTS)
        for unfinished in path.glob("head-*"):  # of killed processes
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"the head cannot be written to {path}: {error}") from error


def _new_weights(path: Path, digest: str) -> Path:
    """Where weights are between the moment they are written and the moment that config.json names them."""
    return path / f"head-{digest[:16]}.safetensors"


def _write_config(path: Path, config: dict[str, Any]) -> None:
    files.write_whole(path / "config.json", json.dumps(files.seal(config), indent=2) + "\n")


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The checked `config.json` of a head directory.

    Raises:
      UserError: there is none, or it describes something else.
    """
    file = Path(path) / "config.json"
    try:
        config = files.read_sealed(file)
    except UserError as error:
        raise UserError(f"{path} is no draft head: {error}") from error
    acceptance = config.get("acceptance")
    require(
        (
            config.get("format") == FORMAT and isinstance(config.get("target"), dict),
            f"{path} is no draft head: {file} has no format {FORMAT!r}",
        ),
        (
            config.get("version") == VERSION,
            f"{file} has format version {config.get('version')}, this program reads version {VERSION}",
        ),
        (
            acceptance is None
            or (isinstance(acceptance, list) and all(type(x) in (int, float) and 0 <= x <= 1 for x in acceptance)),
            f"{file}: acceptance {acceptance!r} must list numbers from 0 to 1",
        ),
    )
    return config


def record_acceptance(path: str | os.PathLike, acceptance: Sequence[float]) -> None:
    """Writes into a head's `config.json` how often its drafts were right.

    Args:
      path: the head's directory.
      acceptance: f[k], how often the drafts up to each position were all right, as `train.py evaluate` counts it.

    Raises:
      UserError: no head is there, or its file cannot be written.
    """
    config = read_config(path) | {"acceptance": list(acceptance)}
    try:
        _write_config(Path(path), config)
    except OSError as error:
        raise UserError(f"the head in {path} cannot be written: {error}") from error


def load_head(
    path: str | os.PathLike, target_config: TargetConfig
) -> tuple[DraftConfig, dict[str, Any], np.ndarray | None]:
    """Reads a head for a target.

    Returns:
      The bound `DraftConfig`, the parameters as numpy arrays in the dtype they were stored in, and token_ids i32[V']
      or None.

    Raises:
      UserError: no head there, a damaged one or one for a target of other sizes, or a missing or misshapen tensor.
    """
    config = read_config(path)
    made_for = {field: config["target"].get(field) for field in TARGET_FIELDS}
    given = {field: getattr(target_config, field) for field in TARGET_FIELDS}
    if made_for != given:
        raise UserError(f"the head in {path} is for {_sizes(made_for)}, the target is {_sizes(given)}")
    draft_config = _draft_config(Path(path) / "config.json", config).bind(target_config)
    file = _weights_file(Path(path), config)
    try:
        with file.open("rb") as weights:
            digest = hashlib.file_digest(weights, "sha256").hexdigest()
        if config.get("weights") not in (None, digest):
            raise UserError(f"{file} is not what was written there: it is damaged, export or download the head again")
        tensors = safetensors.numpy.load_file(file)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:  # some of an unknown dtype
        raise UserError(f"{file} cannot be read: {error}") from error
    params = {}
    shapes = nn.unbox(boxed_params(target_config, draft_config))
    for name, expected in flatten_dict(shapes, sep="/").items():
        params[name] = _tensor(file, tensors, f"draft/{name}", expected.shape)
    token_ids = None
    if draft_config.draft_vocab_size is not None:
        token_ids = _tensor(file, tensors, "token_ids", (draft_config.draft_vocab_size,))
        if token_ids.dtype.kind != "i" or token_ids.min() < 0 or token_ids.max() >= target_config.vocab_size:
            raise UserError(f"{file}: token_ids are not all among the target's {target_config.vocab_size} tokens")
    return draft_config, unflatten_dict(params, sep="/"), token_ids


def _weights_file(path: Path, config: dict[str, Any]) -> Path:
    new = _new_weights(path, str(config.get("weights")))
    return new if new.exists() else path / WEIGHTS  # the one where a killed process had no time to rename it


def _draft_config(file: Path, config: dict[str, Any]) -> DraftConfig:
    """The part of a head's `config.json` that describes its drafter."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(DraftConfig)}
    given = {name: value for name, value in config.items() if name in kinds}
    for name, value in given.items():
        fits = {
            "int": _is_count(value),
            "int | None": value is None or _is_count(value),
            "bool": type(value) is bool,
            "str": type(value) is str,
            "tuple[int, ...]": value is None or (isinstance(value, list) and all(type(x) is int for x in value)),
        }
        if not fits[kinds[name]]:
            raise UserError(f"{file}: {name} {value!r} is nothing that a draft head has")
    return DraftConfig(**(given | {name: tuple(given.get(name) or ()) for name in ("hook_layers", "kv_layers")}))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def boxed_params(target_config: TargetConfig, draft_config: DraftConfig) -> dict[str, Any]:
    """The head's parameter tree as shapes f32 with their logical axes, without making it."""
    return boxed_params_of(drafters.make(target_config, draft_config, "float32"))


def boxed_params_of(drafter: Drafter) -> dict[str, Any]:
    """A drafter's parameter tree as shapes f32 with their logical axes, without making it."""
    width = drafter.target.width
    hooks = jax.ShapeDtypeStruct((1, 2, len(drafter.config.hook_layers), width), jnp.float32)
    embedding = jax.ShapeDtypeStruct((1, 2, width), jnp.float32)
    with without_mesh():
        return jax.eval_shape(drafter.init, jax.random.key(0), hooks, embedding)["params"]


def _tensor(file: Path, tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{file} has no tensor {name!r}")
    if tensors[name].shape != shape:
        raise UserError(f"{file}: tensor {name!r} has shape {tensors[name].shape}, its config asks for {shape}")
    return tensors[name]


def _sizes(target: dict[str, Any]) -> str:
    return ", ".join(f"{field} {value}" for field, value in target.items())
