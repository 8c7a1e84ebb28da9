"""run.json of a training run: what it was started with, which the next start is compared with and `export` reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specformer_jax import files
from specformer_jax.config import TargetConfig
from specformer_jax.errors import UserError
from specformer_jax.training.config import BoundConfig
from specformer_jax.training.data.documents import Document

NAME = "run.json"

# What does not make the curve another run's, beyond the rounding of sums that are taken in another order.
HARMLESS = frozenset(
    {"accumulation", "checkpoint_every", "distill", "init", "keep_best", "keep_last", "log_every", "mesh", "remat"}
)
# What `--allow-change` may name: all else that a run is told, apart from what its state is made for.
CHANGEABLE = frozenset(field.name for field in dataclasses.fields(BoundConfig)) - HARMLESS - {"draft", "optimizer"} | {
    "data",
    "offline",
    "tokenizer",
}


def describe(
    config: BoundConfig,
    target: TargetConfig,
    documents: Sequence[Document],
    token_ids: np.ndarray | None,
    tokenizer: str | None,
    offline: bool,
) -> dict[str, Any]:
    """What a run is started with, as JSON has it.

    Args:
      config: what the run trains.
      target: the sizes of its target.
      documents: what it trains on, of which a digest is kept.
      token_ids: the token ids of a pruned draft vocabulary, or None.
      tokenizer: the fingerprint of the target's tokenizer, or None if unknown.
      offline: whether the target's hooks come from a store, where they are bfloat16.
    """
    return json.loads(
        json.dumps(
            {
                "config": dataclasses.asdict(config),
                "target": dataclasses.asdict(target),
                "data": digest_of(documents),
                "token_ids": None if token_ids is None else token_ids.tolist(),
                "tokenizer": tokenizer,
                "offline": offline,
            }
        )
    )


def digest_of(documents: Sequence[Document]) -> str:
    """Names documents by what is trained on, in their order; their ids are no part of it."""
    digest = hashlib.sha256()
    for document in documents:
        for name, value in zip(document._fields, document, strict=True):
            if name != "id":
                digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


def write(run: Path, described: dict[str, Any]) -> None:
    """Keeps what `describe` gave.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        files.write_whole(run / NAME, json.dumps(files.seal(described)) + "\n")
    except OSError as error:
        raise UserError(f"the run cannot be described in {run}: {error}") from error


def read(run: str | os.PathLike) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
      UserError: it cannot be read, or is not what was written.
    """
    try:
        stored = files.read_sealed(Path(run) / NAME)
        if not isinstance(stored["config"]["draft"], dict) or not isinstance(stored["target"], dict):
            raise UserError(f"{NAME} describes no run")
        stored["token_ids"], stored["tokenizer"]
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{run} is no training run: {NAME} cannot be read ({error})") from error
    return stored


def check(run: Path, stored: dict[str, Any], now: dict[str, Any], allowed: Collection[str] = ()) -> list[str]:
    """Refuses to go on where the state would not fit, or the curve would become another run's.

    Args:
      run: the run's folder.
      stored: what the run was started with, as `read` gave it.
      now: what it shall go on with, as `describe` gives it.
      allowed: fields that may change though the curve will not be that of one run.

    Returns:
      A phrase for each thing that has changed and may, "mesh (1, 1, 1) -> (2, 1, 1)" say.

    Raises:
      UserError: naming what differs.
    """
    draft = now["config"]["draft"]
    pairs = {f"draft.{name}": (value, draft.get(name)) for name, value in stored["config"]["draft"].items()}
    pairs["optimizer"] = (stored["config"].get("optimizer"), now["config"]["optimizer"])
    sizes = {name: value for name, value in stored["target"].items() if name != "eos_ids"}  # which shape nothing
    pairs |= {f"target's {name}": (value, now["target"].get(name)) for name, value in sizes.items()}
    if differing := _differing(pairs):
        raise UserError(
            f"{run} holds a run with {'; '.join(differing.values())}: go on with the options it was started with, or"
            " name another --run"
        )
    # An earlier version kept fewer of them.
    fields = {name: (stored["config"][name], now["config"][name]) for name in now["config"] if name in stored["config"]}
    del fields["draft"]
    fields |= {name: (stored[name], now[name]) for name in ("data", "offline", "tokenizer") if name in stored}
    changed = _differing(fields)
    if refused := changed.keys() - HARMLESS - set(allowed):
        flags = " ".join(f"--allow-change {name}" for name in sorted(refused))
        raise UserError(
            f"{run} holds a run with {'; '.join(changed[name] for name in sorted(refused))}, and its curve would become"
            f" another's: go on with what it was started with, say {flags}, or name another --run"
        )
    return [f"{name}: {fields[name][0]} -> {fields[name][1]}" for name in changed]


def _differing(pairs: dict[str, tuple[Any, Any]]) -> dict[str, str]:
    short = lambda value: f"{value[:12]}.." if isinstance(value, str) and len(value) == 64 else value
    return {name: f"{name} {short(was)}, not {short(now)}" for name, (was, now) in pairs.items() if was != now}
