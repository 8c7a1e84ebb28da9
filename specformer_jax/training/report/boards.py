"""Boards of other projects that draw a run's curves while it trains."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specformer_jax.errors import UserError, require
from specformer_jax.training.metrics import Board


class TensorBoard:
    """Event files that `tensorboard --logdir` reads."""

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See `Board`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Board`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a project at Weights & Biases; one that goes on here goes on there."""

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]):
        import wandb

        name = folder.resolve().name
        try:
            self._run = wandb.init(project=project, name=name, id=name, resume="allow", dir=folder, config=dict(config))
        except Exception as error:  # no account, no network, a name that it does not take
            raise UserError(f"--wandb {project}: {error}; WANDB_MODE=offline keeps the run on the disk") from error

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See `Board`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Board`."""
        self._run.finish()


def check_wandb(project: str | None) -> None:
    """Raises UserError where `--wandb` names no project, or its package is not installed."""
    require(
        (project is None or bool(project.strip()), "--wandb is empty: name a project"),
        (
            project is None or importlib.util.find_spec("wandb") is not None,
            "--wandb needs the package wandb: pip install wandb",
        ),
    )


def boards(folder: Path, wandb_project: str | None, config: Mapping[str, Any]) -> list[Board]:
    """TensorBoard where tensorboardX is installed, Weights & Biases where a project is named.

    Args:
      folder: the run's folder.
      wandb_project: the name of the project, or None.
      config: what the run was started with, to be shown there.

    Raises:
      UserError: Weights & Biases refuses.
    """
    found: list[Board] = []
    if importlib.util.find_spec("tensorboardX") is not None:
        found.append(TensorBoard(folder / "tensorboard"))
    if wandb_project is not None:
        found.append(WeightsAndBiases(wandb_project, folder, config))
    return found
