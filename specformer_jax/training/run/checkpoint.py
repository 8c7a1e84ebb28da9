"""Training checkpoints: the only file that imports orbax. Its v1 API writes asynchronously and commits by a rename.

Each holds digests of all its arrays, so that one that was damaged on the disk is never taken for a good one: it is set
aside under the name damaged-STEP, and the one before it is taken.
"""

from __future__ import annotations

import json
import logging
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from specformer_jax import files
from specformer_jax.errors import UserError
from specformer_jax.training.run import content

log = logging.getLogger(__name__)
# Orbax warns at every save that the record beside the state has no arrays to merge, which is so.
logging.getLogger("absl").addFilter(lambda said: "No per-process OCDBT" not in said.getMessage())


class Checkpoints:
    """The checkpoints of one run: keeps the newest and the best, restores onto any mesh and number of processes."""

    def __init__(
        self, folder: str | os.PathLike, *, keep_last: int = 3, keep_best: int = 1, judged_by: str | None = None
    ):
        """
        Args:
          folder: where the checkpoints are; made if it is not there. Those that do not say what they are worth are set
            aside, with a warning.
          keep_last: how many of the newest checkpoints are kept.
          keep_best: how many checkpoints are kept for the highest kappa; 0 keeps none for that.
          judged_by: names the answers that kappa is counted along, None for those that are trained on; kappas along
            other ones are not compared with these.

        Raises:
          UserError: the folder cannot be used, or no checkpoint in it can.
        """
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(keep_last)]
        if keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["kappa"] if metrics.get("judged_by") == judged_by else 0.0,
                    reverse=False,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._folder, self._judged_by = Path(folder).resolve(), judged_by
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._set_aside(_unusable(self._folder))
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

    def save(self, step: int, state: Any, extra: dict[str, Any], kappa: float) -> None:
        """Begins to write a checkpoint in the background; the state may be donated as soon as this returns.

        Args:
          step: how many steps are done; it names the checkpoint.
          state: what is saved, a pytree of arrays.
          extra: the data iterator's state and what else a restart needs, as JSON has it.
          kappa: what the state is worth; it decides which checkpoints are best.

        Raises:
          UserError: the state is not finite, or this or the save before it failed, such as on a full disk.
        """
        if step in self.steps:
            return
        digests, broken = content.examine(state)
        if broken:
            self.wait()
            raise UserError(
                f"{broken[0]} is not finite after step {step}, so it is not saved: the last good checkpoint is"
                f" {self.steps[-1:]}; a lower learning rate may help"
            )
        record = json.dumps(files.seal({"extra": extra, "digests": digests}))
        try:
            worth = files.seal({"kappa": kappa, "judged_by": self._judged_by})
            self._orbax.save_checkpointables_async(
                step, {"state": state, "extra": {"record": record}}, metrics=worth, force=True
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
        """The newest checkpoint that is what was written; newer ones are passed over with a warning and set aside.

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
                state, extra = _load(self._folder / str(step), abstract)
            except Exception as error:  # every kind of damage raises its own
                path = self._folder / str(step)
                log.warning("checkpoint %s is damaged, going back to the one before it: %s", path, _reason(error))
                damaged.append(step)
                continue
            self._set_aside(damaged)
            if damaged:
                self._orbax.reload()
            return step, state, extra
        if steps:
            raise _none_of(steps, self._folder)
        return None

    def close(self) -> None:
        """Waits for what is in flight and frees the threads."""
        self.wait()
        self._orbax.close()

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Renames checkpoints, so that training may write those steps again."""
        for step in steps:
            if jax.process_index() == 0:
                times = len(list(self._folder.glob(f"damaged-{step}*")))
                (self._folder / str(step)).rename(self._folder / f"damaged-{step}{f'-{times + 1}' if times else ''}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")


def load_params(folder: str | os.PathLike, step: int | None = None) -> tuple[int, Any]:
    """The head's parameters of a run's checkpoint as numpy arrays, for `train.py export`; the run may be going on.

    Args:
      folder: the run's folder of checkpoints.
      step: the checkpoint to read; None takes the newest.

    Returns:
      The step of the checkpoint, and the parameters.

    Raises:
      UserError: there is no such checkpoint, or it is not what was written.
    """
    # Not `Checkpoints`, which clears away half-written ones, that may be a running fit's, and reads all the others.
    folder = Path(folder).resolve()
    steps = _committed(folder)
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{folder} has no checkpoint{'' if step is None else f' {step}'}: it has {steps}")
    step = steps[-1] if step is None else step
    try:
        path = folder / str(step)
        stored = ocp.checkpointables_metadata(path).metadata["state"]
        # On one device, whatever mesh it was trained on.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), stored)
        state, _ = _load(path, abstract)
        params = state["params"] if isinstance(state, dict) else state[1]
    except Exception as error:  # every kind of damage raises its own
        raise UserError(f"checkpoint {step} in {folder} cannot be read: {_reason(error)}") from error
    return step, jax.tree.map(np.asarray, params)


def best(folder: str | os.PathLike) -> tuple[int, float, bool]:
    """The checkpoint of the highest kappa among those that are judged as the newest is.

    Returns:
      Its step, its kappa, and whether that was counted along held-out answers.

    Raises:
      UserError: no checkpoint says what it is worth.
    """
    folder, found = Path(folder), {}
    for step in _committed(folder):
        worth = folder / str(step) / "metrics" / "metrics"
        if worth.exists():
            found[step] = files.read_sealed(worth)
    if not found:
        raise UserError(f"no checkpoint in {folder} says what it is worth: export without --best")
    judged_by = found[max(found)].get("judged_by")
    kappas = {step: worth["kappa"] for step, worth in found.items() if worth.get("judged_by") == judged_by}
    step = max(kappas, key=lambda step: (kappas[step], step))
    return step, kappas[step], judged_by is not None


def _load(path: Path, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """The state and what was saved beside it.

    Raises:
      Exception: of any kind, where the files are damaged.
    """
    found = ocp.load_checkpointables(path, {"state": abstract, "extra": None})
    if "record" not in found["extra"]:
        log.warning("checkpoint %s has no digests, an earlier version wrote it: its content is not verified", path)
        return found["state"], found["extra"]
    record = files.unseal("its record", json.loads(found["extra"]["record"]))
    digests, broken = content.examine(found["state"])
    differing = [name for name, digest in record["digests"].items() if digests.get(name) != digest]
    if differing or broken:
        raise ValueError(f"{(differing or broken)[0]} is not what was written")
    return found["state"], record["extra"]


def _committed(folder: Path) -> list[int]:
    """The steps that there are committed checkpoints of, ascending, read or not."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def _unusable(folder: Path) -> list[int]:
    """The steps whose checkpoints orbax could not list, or not compare with others by what they are worth.

    Raises:
      UserError: there are checkpoints, and all are such.
    """
    steps, damaged = _committed(folder), []
    for step in steps:
        path = folder / str(step)
        try:
            files.read_json_object(path / "_CHECKPOINT_METADATA")
            metrics = path / "metrics" / "metrics"
            if metrics.exists() and not math.isfinite(files.read_sealed(metrics)["kappa"]):
                raise UserError(f"{metrics} holds a kappa that is not finite")
        except (UserError, KeyError, TypeError) as error:
            log.warning("checkpoint %s is damaged, it is set aside: %s", path, error)
            damaged.append(step)
    if damaged and damaged == steps:
        raise _none_of(steps, folder)
    return damaged


def _reason(error: Exception) -> str:
    """What orbax says in many lines, as part of one sentence."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")


def _none_of(steps: Sequence[int], folder: Path) -> UserError:
    return UserError(f"none of the checkpoints {list(steps)} in {folder} can be read")
