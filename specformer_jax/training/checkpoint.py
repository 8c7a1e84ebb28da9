"""Training checkpoints: the only file that imports orbax. Its v1 API writes asynchronously and commits by a rename."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from specformer_jax.errors import UserError

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run: keeps the newest and the best, restores onto any mesh and number of processes."""

    def __init__(self, folder: str | os.PathLike, *, keep_last: int = 3, keep_best: int = 1):
        """
        Args:
          folder: where the checkpoints are; made if it is not there.
          keep_last: how many of the newest checkpoints are kept.
          keep_best: how many checkpoints are kept for the highest kappa; 0 keeps none for that.

        Raises:
          UserError: the folder cannot be used.
        """
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(keep_last)]
        if keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["kappa"],
                    reverse=False,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._folder = Path(folder).resolve()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._orbax = ocp.training.Checkpointer(
                self._folder,
                # When to save is the training loop's decision.
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise UserError(f"checkpoints cannot be kept in {folder}: {error}") from error

    @property
    def steps(self) -> list[int]:
        """The steps that there are committed checkpoints of, ascending."""
        return sorted(found.step for found in self._orbax.checkpoints)

    def save(self, step: int, state: Any, extra: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Begins to write a checkpoint in the background; the state may be donated as soon as this returns.

        Args:
          step: how many steps are done; it names the checkpoint.
          state: what is saved, a pytree of arrays.
          extra: the data iterator's state and what else a restart needs, as JSON has it.
          metrics: what is known of the state; "kappa" decides which checkpoints are best.

        Raises:
          UserError: this or the save before it failed, such as on a full disk.
        """
        try:
            if step not in self.steps:
                self._orbax.save_checkpointables_async(
                    step, {"state": state, "extra": extra}, metrics=metrics, force=True
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"checkpoint {step} cannot be written to {self._folder}: {error}") from error

    def wait(self) -> None:
        """Waits until the checkpoint in flight is committed.

        Raises:
          UserError: it could not be written.
        """
        try:
            while self._orbax.is_saving_in_progress():
                self._orbax.wait()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"a checkpoint cannot be written to {self._folder}: {error}") from error

    def restore(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest checkpoint that can be read; newer ones are passed over with a warning and set aside.

        Where none can be read the mistake may be another than damage, so all stay where they are.

        Args:
          abstract: the state as `jax.ShapeDtypeStruct`s with the shardings to restore into.

        Returns:
          (step, state, extra), or None if there is no checkpoint.

        Raises:
          UserError: there are checkpoints, but none can be read.
        """
        steps, damaged = self.steps, []
        for step in reversed(steps):
            try:
                found = self._orbax.load_checkpointables(step, {"state": abstract, "extra": None})
            except Exception as error:  # every kind of damage raises its own
                log.warning("checkpoint %s is damaged, going back to the one before it: %s", self._path(step), error)
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return step, found["state"], found["extra"]
        if steps:
            raise UserError(f"none of the checkpoints {steps} in {self._folder} can be read")
        return None

    def close(self) -> None:
        """Waits for what is in flight and frees the threads."""
        self.wait()
        self._orbax.close()

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Renames checkpoints, so that training may write those steps again."""
        for path in map(self._path, steps):
            if jax.process_index() == 0:
                shutil.move(path, path.with_name(f"damaged-{path.name}"))
        if steps:
            self._orbax.reload()

    def _path(self, step: int) -> Path:
        for path in self._folder.iterdir():
            if re.fullmatch(rf"(?:\D*_)?0*{step}", path.name):
                return path
        return self._folder / str(step)


def load_params(folder: str | os.PathLike, step: int | None = None) -> tuple[int, Any]:
    """The head's parameters of a run's checkpoint as numpy arrays, for `train.py export`; the run may be going on.

    Args:
      folder: the run's folder of checkpoints.
      step: the checkpoint to read; None takes the newest.

    Returns:
      The step of the checkpoint, and the parameters.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    # Not `Checkpoints`, which clears away half-written ones: they may be a running fit's.
    with ocp.training.Checkpointer(Path(folder).resolve()) as checkpoints:
        steps = sorted(found.step for found in checkpoints.checkpoints)
        if not steps or (step is not None and step not in steps):
            raise UserError(f"{folder} has no checkpoint{'' if step is None else f' {step}'}: it has {steps}")
        step = steps[-1] if step is None else step
        try:
            stored = checkpoints.checkpointables_metadata(step).metadata["state"]
            # On one device, whatever mesh it was trained on.
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), stored)
            state = checkpoints.load_checkpointables(step, {"state": abstract})["state"]
        except Exception as error:  # every kind of damage raises its own
            raise UserError(f"checkpoint {step} in {folder} cannot be read: {error}") from error
    params = state["params"] if isinstance(state, dict) else state[1]
    return step, jax.tree.map(np.asarray, params)
