"""Heads between runs: a run's head written as an exported one, and an exported head that a run goes on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specformer_jax.config import DraftConfig, RopeScaling, TargetConfig
from specformer_jax.errors import UserError
from specformer_jax.loading import head_checkpoint
from specformer_jax.training.config import BoundConfig
from specformer_jax.training.data.documents import Document, draft_vocabulary
from specformer_jax.training.run import checkpoint, run_record

GROWS = ("max_draft_length", "draft_blocks", "ffn")  # sizes that may be larger than in the head to go on from


def export(run: str | Path, out: str | Path, *, target_name: str | None = None, step: int | None = None) -> int:
    """Writes a run's head as one safetensors file and its config.

    Args:
      run: the run's folder.
      out: the folder of the exported head.
      target_name: the name of the target that the head's config shall have; None takes the one it was trained for.
      step: the checkpoint to export; None takes the newest.

    Returns:
      The step of the checkpoint.

    Raises:
      UserError: no such run or checkpoint.
    """
    run = Path(run)
    stored = run_record.read(run)
    try:
        sizes = stored["target"]
        scaling = None if sizes["rope_scaling"] is None else RopeScaling(**sizes["rope_scaling"])
        target = TargetConfig(**(sizes | {"eos_ids": tuple(sizes["eos_ids"]), "rope_scaling": scaling}))
        draft = DraftConfig(
            **(stored["config"]["draft"] | {"hook_layers": tuple(stored["config"]["draft"]["hook_layers"])})
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{run} is no training run: {run_record.NAME} describes no head ({error!r})") from error
    token_ids = stored["token_ids"]
    step, params = checkpoint.load_params(run / "checkpoints", step)
    head_checkpoint.save_head(
        out,
        draft,
        target,
        params,
        None if token_ids is None else np.asarray(token_ids, np.int32),
        target_name=target_name or stored["config"]["target"],
        tokenizer=stored["tokenizer"],
    )
    return step


def start_of(config: BoundConfig, target: TargetConfig, documents: Sequence[Document]) -> tuple[Any, np.ndarray | None]:
    """The parameters of a head to go on from, or None, and the token ids of a pruned draft vocabulary, or None.

    Raises:
      UserError: the head that `TrainConfig.init` names is none to go on from.
    """
    first_params, token_ids = None, None
    if Path(config.init).is_dir():
        first_params, token_ids = read_start(config, target)
    if token_ids is None and config.draft.draft_vocab_size is not None:
        token_ids = draft_vocabulary(documents, config.draft.draft_vocab_size, target)
    return first_params, token_ids


def read_start(config: BoundConfig, target: TargetConfig) -> tuple[Any, np.ndarray | None]:
    """Reads the exported head that `config.init` names, to go on from.

    Returns:
      Its parameters, and the token ids of its draft vocabulary if that is to stay.

    Raises:
      UserError: it is another head than the configuration's.
    """
    stored, params, token_ids = head_checkpoint.load_head(config.init, target)
    draft = config.draft
    # No parameter belongs to the draft vocabulary, so another size may be asked for and is built from the data.
    may_differ = ("draft_vocab_size", "sequential_ffn", "window", *GROWS)
    like_asked = dataclasses.replace(stored, **{name: getattr(draft, name) for name in may_differ})
    if like_asked != draft or any(getattr(stored, name) > getattr(draft, name) for name in GROWS):
        raise UserError(
            f"the head in {config.init} is another one than the configuration's, and none that can grow to it: {stored}"
        )
    if (draft.sequential_ffn or 0) < (stored.sequential_ffn or 0):
        if draft.sequential_ffn is None:
            raise UserError(f"the head in {config.init} has a sequential FFN: set draft.sequential_ffn to a width")
        params = _narrowed(params, draft.sequential_ffn)
    return params, token_ids if stored.draft_vocab_size == draft.draft_vocab_size else None


def _narrowed(params: dict[str, Any], width: int) -> dict[str, Any]:
    """The head with the inner units of its sequential FFN that weigh most: by norm of gate times up times down."""
    sequential, ffn = params["sequential"], params["sequential"]["ffn"]
    inward = np.concatenate([sequential["slot_gate_up"], ffn["gate_up"]]).astype(np.float32)  # [3D, 2, F]
    outward = np.linalg.norm(ffn["down"].astype(np.float32), axis=1)
    gate, up = np.linalg.norm(inward, axis=0)
    heaviest_first = np.argsort(-(gate * up) * outward)
    kept = np.sort(heaviest_first[:width])
    narrow = {"gate_up": ffn["gate_up"][:, :, kept], "down": ffn["down"][kept]}
    return params | {"sequential": sequential | {"slot_gate_up": sequential["slot_gate_up"][:, :, kept], "ffn": narrow}}
