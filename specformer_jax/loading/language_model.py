"""From names on a command line to a model that decodes: target weights, tokenizer and draft head together."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from specformer_jax import drafters
from specformer_jax.config import DraftConfig, SamplingParams, TargetConfig
from specformer_jax.decoding.model import Model, Params
from specformer_jax.drafters.ngram import WithLookup
from specformer_jax.errors import UserError
from specformer_jax.loading import head_checkpoint, packing, weights
from specformer_jax.loading.target_config import read_config
from specformer_jax.loading.tokenizer import Tokenizer, load_tokenizer
from specformer_jax.nn.mesh import param_shardings
from specformer_jax.nn.target import Target, lm_head

DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A loaded model.

    Attributes:
      name: the name by which the target was asked for.
      model: the static part: the target, the drafter, the switches.
      params: the arrays that the model reads (see `Model`).
      tokenizer: turns text into ids and back.
      draft_name: the directory that the draft head came from, or None.
    """

    name: str
    model: Model
    params: Params
    tokenizer: Tokenizer
    draft_name: str | None

    @property
    def config(self) -> TargetConfig:
        """The sizes and variants of the target."""
        return self.model.target.config

    @property
    def acceptance(self) -> Sequence[float] | None:
        """How often the drafts up to each position are all right, f[J], where the head's card says so."""
        return None if self.draft_name is None else head_checkpoint.read_config(self.draft_name).get("acceptance")

    def in_window(self, window: int) -> LanguageModel:
        """What decodes with so many tokens a row and step: where no draft fits, no hook is taken and no head is run."""
        return self if window > 1 else self.without_drafter()

    def sampling_with(self, sampling_params: SamplingParams) -> LanguageModel:
        """What decodes under these parameters alone; where they rule nothing out, an accelerator holds no [B, W, V]."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, truncation=sampling_params.truncates))

    def without_lookup(self) -> LanguageModel:
        """The head drafts everywhere, as with `lookup=False`."""
        head = self.model.drafter
        if not isinstance(head, WithLookup):
            return self
        return dataclasses.replace(self, model=dataclasses.replace(self.model, drafter=head.drafter))

    def without_drafter(self) -> LanguageModel:
        """The target alone, in the same arrays: plain decoding at its best."""
        target = Target(self.config, (), self.model.target.dtype)
        model = dataclasses.replace(self.model, target=target, drafter=None)
        return dataclasses.replace(self, model=model, params={"target": self.params["target"]}, draft_name=None)


def load(
    target: str = "smollm2-135m",
    *,
    draft: str = "auto",
    lookup: bool = True,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
) -> LanguageModel:
    """Loads a target, its tokenizer and a draft head.

    Args:
      target: "smollm2-135m" (built in, fetched once), a Hugging Face directory, a Hub id or a .gguf file.
      draft: "auto" takes the head shipped for this target, or none; "none" decodes plainly; "ngram" drafts what
        followed the same tokens earlier in the prompt and the answer; else the directory of a head that
        `train.py export` wrote.
      lookup: where the newest tokens have stood in the prompt or the answer before, a head gives way to what followed
        them (`drafters.ngram.WithLookup`).
      dtype: "bfloat16" or "float32", for the weights and the arithmetic.
      mesh: a mesh of `mesh.make_mesh`; every tensor is placed straight into its sharding on it. On one CPU bfloat16
        weights are packed for the native products, where those were built.

    Raises:
      UserError: one sentence saying what is wrong with the files, the names or the network, and what to do.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} must be one of {', '.join(DTYPES)}")
    path = weights.resolve(target)
    config = read_config(path)
    tokenizer = load_tokenizer(path, config)
    folder = None
    if draft not in ("none", "ngram"):
        folder = _shipped_head(config, tokenizer) if draft == "auto" else Path(draft)
    bound, draft_params, token_ids = (None, None, None) if folder is None else _load_head(folder, config, tokenizer)
    if draft == "ngram":
        bound = DraftConfig(drafter="ngram").bind(config)

    hooks = () if bound is None else bound.hook_layers
    module = Target(config, hooks, dtype)
    pack = packing.packs(dtype, mesh)
    params: Params = {"target": load_target(path, config, dtype, mesh, pack=pack)}
    head = None
    if bound is not None:
        head = drafters.make(config, bound, dtype)
        if lookup and draft != "ngram":
            head = WithLookup.around(head)
        if draft_params is not None and pack:
            params["draft"] = packing.pack_tree(draft_params)
        elif draft_params is not None:
            places = None
            if mesh is not None:
                places = param_shardings({"draft": head_checkpoint.boxed_params(config, bound)}, mesh)["draft"]
            params["draft"] = jax.device_put(jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), draft_params), places)
        if token_ids is not None:
            ids = jax.device_put(token_ids.astype(jnp.int32), None if mesh is None else NamedSharding(mesh, P()))
            params["draft_vocab"] = {"token_ids": ids, "lm_head": lm_head(params["target"])[ids]}
    return LanguageModel(target, Model(module, head), params, tokenizer, None if folder is None else str(folder))


def load_target(path: Path, config: TargetConfig, dtype: str, mesh: Mesh | None = None, *, pack: bool = False) -> Any:
    """Reads the target's parameters, every tensor straight into its sharding on the mesh.

    Args:
      path: the target's files, of `weights.resolve`.
      config: the target's sizes, of `target_config.read_config`.
      dtype: "bfloat16" or "float32", what the parameters are read as.
      mesh: a mesh of `mesh.make_mesh`; None takes the default device.
      pack: whether matrices are packed for a CPU's native products; training takes them plain.

    Raises:
      UserError: the files are not those of such a target.
    """
    shardings = None if mesh is None else param_shardings(weights.boxed_params(config), mesh)
    return weights.load_params(path, config, dtype, shardings, pack=pack)


def _load_head(folder: Path, config: TargetConfig, tokenizer: Tokenizer) -> tuple[DraftConfig, Any, Any]:
    fingerprint = head_checkpoint.read_config(folder).get("tokenizer")
    if fingerprint is not None and fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the head in {folder} was trained with another tokenizer ({fingerprint}) than the target's"
            f" ({tokenizer.fingerprint}): give the target that it was trained for"
        )
    return head_checkpoint.load_head(folder, config)


def _shipped_head(config: TargetConfig, tokenizer: Tokenizer) -> Path | None:
    """The head in `specformer_jax/pretrained` for a target of these sizes and this tokenizer, if there is one."""
    shipped = Path(str(importlib.resources.files("specformer_jax"))) / "pretrained"
    for file in sorted(shipped.glob("*/config.json")):
        stored = head_checkpoint.read_config(file.parent)
        same = all(stored["target"].get(field) == getattr(config, field) for field in head_checkpoint.TARGET_FIELDS)
        if same and stored.get("tokenizer") in (None, tokenizer.fingerprint):
            return file.parent
    return None
