"""run.json of a training run: what it was started with, which the next start must agree with and `export` reads."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from specformer_jax import files
from specformer_jax.config import TargetConfig
from specformer_jax.errors import UserError
from specformer_jax.training.config import BoundConfig

NAME = "run.json"


def write(
    run: Path, config: BoundConfig, target: TargetConfig, token_ids: np.ndarray | None, tokenizer: str | None
) -> None:
    """Describes a run.

    Args:
      run: the run's folder.
      config: what the run trains.
      target: the sizes of its target.
      token_ids: the token ids of a pruned draft vocabulary, or None.
      tokenizer: the fingerprint of the target's tokenizer, or None if unknown.

    Raises:
      UserError: the file cannot be written.
    """
    described = _identity(config, target) | {
        "token_ids": None if token_ids is None else token_ids.tolist(),
        "tokenizer": tokenizer,
    }
    try:
        files.write_whole(run / NAME, json.dumps(described) + "\n")
    except OSError as error:
        raise UserError(f"the run cannot be described in {run}: {error}") from error


def read(run: str | os.PathLike) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return json.loads((Path(run) / NAME).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is no training run: {NAME} cannot be read ({error})") from error


def check(run: Path, config: BoundConfig, target: TargetConfig) -> None:
    """Refuses to go on from checkpoints of another head, optimizer or target, which would not fit into the state.

    Args:
      run: the run's folder; without a run.json nothing is known, and nothing refused.
      config: what the run shall go on training.
      target: the sizes of its target.

    Raises:
      UserError: naming what differs.
    """
    if not (run / NAME).exists():
        return
    stored, now = read(run), json.loads(json.dumps(_identity(config, target)))
    draft = now["config"]["draft"]
    pairs = {f"draft.{name}": (value, draft.get(name)) for name, value in stored["config"]["draft"].items()}
    pairs["optimizer"] = (stored["config"]["optimizer"], now["config"]["optimizer"])
    sizes = {name: value for name, value in stored["target"].items() if name != "eos_ids"}  # which shape nothing
    pairs |= {f"target's {name}": (value, now["target"].get(name)) for name, value in sizes.items()}
    differing = [f"{name} {was}, not {wanted}" for name, (was, wanted) in pairs.items() if was != wanted]
    if differing:
        raise UserError(
            f"{run} holds a run with {'; '.join(differing)}: go on with the options it was started with, or name"
            " another --run"
        )


def _identity(config: BoundConfig, target: TargetConfig) -> dict[str, Any]:
    return {"config": dataclasses.asdict(config), "target": dataclasses.asdict(target)}
