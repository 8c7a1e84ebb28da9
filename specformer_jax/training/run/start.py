"""How a run begins: anew, or going on with what its folder holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from specformer_jax.errors import require
from specformer_jax.training.run import owner, run_record


@dataclasses.dataclass(frozen=True)
class Start:
    """How a run begins where its folder may hold one already.

    Attributes:
      fresh: what a run has left in the folder is moved aside, and a new run begins.
      must_resume: without a checkpoint to go on from nothing begins.
      allow_change: what may be another than the run was started with, though its curve becomes another's
        (`run_record.CHANGEABLE`).
    """

    fresh: bool = False
    must_resume: bool = False
    allow_change: tuple[str, ...] = ()

    def __post_init__(self):
        unknown = sorted(set(self.allow_change) - run_record.CHANGEABLE)
        require(
            (not (self.fresh and self.must_resume), "--fresh begins a new run and --must-resume goes on with one"),
            (
                not unknown,
                f"--allow-change {' '.join(unknown)}: it takes one of {', '.join(sorted(run_record.CHANGEABLE))}",
            ),
        )

    def check(self, folder: Path) -> None:
        """Raises UserError where there has to be a run in a folder to go on with, and is none."""
        require(
            (
                not self.must_resume or any((folder / "checkpoints").glob("[0-9]*")),
                f"there is no checkpoint in {folder} to go on from: look for the run's folder, or leave out"
                " --must-resume",
            )
        )

    def stored_run(self, folder: Path) -> dict[str, Any] | None:
        """What the run that a folder holds was started with; None without one, or if it has made way for a new one.

        Raises:
          UserError: there has to be one and is none, or it cannot be read or moved.
        """
        self.check(folder)
        begun = any((folder / "checkpoints").glob("[0-9]*"))
        if self.fresh:
            before = owner.set_aside(folder) if jax.process_index() == 0 else None
            if before is not None:
                print(f"what {folder} held is in {before} now")
            if jax.process_count() > 1:  # no other host may find what is about to be moved
                multihost_utils.sync_global_devices("the folder is empty")
            return None
        return run_record.read(folder) if begun and (folder / run_record.NAME).exists() else None
