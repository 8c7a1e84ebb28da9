"""From names on a command line to a model that decodes: target weights, tokenizer and draft head together."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from specformer_jax import drafters
from specformer_jax.config import LOOKUPS, DraftConfig, SamplingParams, TargetConfig
from specformer_jax.decoding.model import Model, Params
from specformer_jax.decoding.verification.kind import Verification
from specformer_jax.drafters.ngram import WithLookup
from specformer_jax.errors import UserError
from specformer_jax.loading import fetch, head_checkpoint, packing, weights
from specformer_jax.loading.published.description import is_published
from specformer_jax.loading.published.head import LoadedHead, read
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
        if self.draft_name is None or is_published(Path(self.draft_name)):
            return None
        return head_checkpoint.read_config(self.draft_name).get("acceptance")

    def in_window(self, window: int) -> LanguageModel:
        """What decodes with so many tokens a row and step: where no draft fits, no hook is taken and no head is run."""
        return self if window > 1 else self.without_drafter()

    def sampling_with(self, sampling_params: SamplingParams) -> LanguageModel:
        """What decodes under these parameters alone: top-k, top-p and min-p are compiled in where one is asked for."""
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
        model = dataclasses.replace(self.model, target=target, drafter=None, verification=Verification())
        return dataclasses.replace(self, model=model, params={"target": self.params["target"]}, draft_name=None)


def load(
    target: str = "smollm2-135m",
    *,
    draft: str = "auto",
    lookup: bool = True,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    verification: Verification = Verification(),
) -> LanguageModel:
    """Loads a target, its tokenizer and a draft head.

    Args:
      target: "smollm2-135m" (built in, fetched once), a Hugging Face directory, a Hub id or a .gguf file.
      draft: "auto" takes the head shipped for this target, or none; "none" decodes plainly; "ngram" drafts what
        followed the same tokens earlier in the prompt and the answer, "logitspec" what followed them and a token that
        the last logits hold likely; else a head: a directory that `train.py export` wrote, or a published EAGLE-3 or
        DFlash head, a directory or a Hub id (`docs/drafters.md`).
      lookup: where the newest tokens have stood in the prompt or the answer before, a head gives way to what followed
        them (`drafters.ngram.WithLookup`).
      dtype: "bfloat16" or "float32", for the weights and the arithmetic.
      mesh: a mesh of `mesh.make_mesh`; every tensor is placed straight into its sharding on it. On one CPU bfloat16
        weights are packed for the native products, where those were built.
      verification: how drafts are verified. Any but the exact one says in its name what it does not keep; no engine and
        no mesh takes it.

    Raises:
      UserError: one sentence saying what is wrong with the files, the names or the network, and what to do.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} must be one of {', '.join(DTYPES)}")
    if mesh is not None:
        verification.require_exact("a mesh")
    path = weights.resolve(target)
    config = read_config(path)
    tokenizer = load_tokenizer(path, config)
    folder = _find_head(draft, config, tokenizer)
    loaded = None if folder is None else _read_head(folder, config, tokenizer, dtype)
    head = None if loaded is None else loaded.drafter
    if draft in LOOKUPS:
        head = drafters.make(config, DraftConfig(drafter=draft).bind(config), dtype)
    elif head is not None and lookup:
        head = WithLookup.around(head)

    if head is None:
        verification.require_exact("a target without a drafter")
    module = Target(config, () if head is None else head.config.hook_layers, dtype)
    pack = packing.packs(dtype, mesh)
    params: Params = {"target": load_target(path, config, dtype, mesh, pack=pack)}
    if loaded is not None:
        params |= _place_head(loaded, params["target"], dtype, mesh, pack)
    model = Model(module, head, verification=verification)
    return LanguageModel(target, model, params, tokenizer, None if folder is None else str(folder))


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


def _find_head(draft: str, config: TargetConfig, tokenizer: Tokenizer) -> Path | None:
    """Where the head is that a user asks for, downloading it first where needed."""
    if draft in ("none", *LOOKUPS):
        return None
    if draft == "auto":
        return _shipped_head(config, tokenizer)
    folder = Path(draft).expanduser()
    return fetch.hub_snapshot(draft) if not folder.exists() and fetch.is_hub_id(draft) else folder


def _read_head(folder: Path, config: TargetConfig, tokenizer: Tokenizer, dtype: str) -> LoadedHead:
    """A head of this project's, or one that others published."""
    if is_published(folder):
        return read(folder, config, dtype)
    fingerprint = head_checkpoint.read_config(folder).get("tokenizer")
    if fingerprint is not None and fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the head in {folder} was trained with another tokenizer ({fingerprint}) than the target's"
            f" ({tokenizer.fingerprint}): give the target that it was trained for"
        )
    bound, params, token_ids = head_checkpoint.load_head(folder, config)
    vocab = {} if token_ids is None else {"token_ids": token_ids.astype(np.int32)}
    return LoadedHead(drafters.make(config, bound, dtype), params, vocab, None)


def _place_head(head: LoadedHead, target_params: Any, dtype: str, mesh: Mesh | None, pack: bool) -> Params:
    """What a head brings to the parameters, on the devices and in the compute dtype."""
    params, placed = head.params, {}
    if head.mask_token is not None:
        params = params | {"mask": target_params["embedding"][head.mask_token]}
    if pack:
        placed["draft"] = packing.pack_tree(params)
    else:
        boxed = {"draft": head_checkpoint.boxed_params_of(head.drafter)}
        places = None if mesh is None else param_shardings(boxed, mesh)["draft"]
        placed["draft"] = jax.device_put(jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params), places)
    if head.vocab:
        placed["draft_vocab"] = _place_vocab(head.vocab, target_params, mesh)
    return placed


def _place_vocab(vocab: dict[str, np.ndarray], target_params: Any, mesh: Mesh | None) -> Params:
    """A head's own vocabulary on the devices; without an LM head of its own, its rows of the target's."""
    boxed = {
        name: nn.LogicallyPartitioned(x, (None,) if name == "token_ids" else ("vocab", "embed"))
        for name, x in vocab.items()
    }
    placed = jax.device_put(vocab, None if mesh is None else param_shardings(boxed, mesh))
    return placed if "lm_head" in placed else placed | {"lm_head": lm_head(target_params)[placed["token_ids"]]}


def _shipped_head(config: TargetConfig, tokenizer: Tokenizer) -> Path | None:
    """The head in `specformer_jax/pretrained` for a target of these sizes and this tokenizer, if there is one."""
    shipped = Path(str(importlib.resources.files("specformer_jax"))) / "pretrained"
    for file in sorted(shipped.glob("*/config.json")):
        stored = head_checkpoint.read_config(file.parent)
        same = all(stored["target"].get(field) == getattr(config, field) for field in head_checkpoint.TARGET_FIELDS)
        if same and stored.get("tokenizer") in (None, tokenizer.fingerprint):
            return file.parent
    return None
