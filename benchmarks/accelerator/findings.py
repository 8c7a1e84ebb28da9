"""What was found so far: a JSON file that is whole at any moment, so that a killed run goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specformer_jax import files
from specformer_jax.errors import UserError

Figures = dict[str, Any]


class Findings:
    """The figures of every unit of every part, the failures, and what was left out.

    The file is an object: "run" says what it is of, "parts" holds by part and unit the figures or {"failed": sentence},
    "left_out" by part and unit a reason, and "running" the unit at work, if any.
    """

    def __init__(self, folder: Path):
        """Reads what the folder holds.

        Raises:
          UserError: its report is damaged, or the folder cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error}") from error
        self.folder, self.file = folder, folder / "report.json"
        self._found: dict[str, Any] = {"run": {}, "parts": {}, "left_out": {}, "running": None}
        if self.file.exists():
            stored = files.read_json_object(self.file)
            if not self._found.keys() <= stored.keys():
                raise UserError(f"{self.file} is no report of this command: name another folder with --out")
            self._found = stored

    def begin(self, run: Figures) -> None:
        """Goes on with a run of the same, or begins it.

        Raises:
          UserError: what is there is of something else.
        """
        stored = self._found["run"]
        for name, value in run.items():
            if stored and stored.get(name) != value:
                raise UserError(
                    f"{self.file} is of another {name} ({stored.get(name)}, here {value}):"
                    " name another folder with --out"
                )
        self._found["run"] = run
        self._write()

    @property
    def run(self) -> Figures:
        """What the figures are of: the device, the versions."""
        return self._found["run"]

    @property
    def running(self) -> tuple[str, str] | None:
        """The part and the unit at work, or at which the last process ended."""
        return None if self._found["running"] is None else tuple(self._found["running"])

    def start(self, part: str, unit: str) -> None:
        """Notes which unit is at work; what was left out earlier is no longer."""
        self._found["running"] = [part, unit]
        self._found["left_out"].get(part, {}).pop(unit, None)
        self._write()

    def add(self, part: str, unit: str, figures: Figures) -> None:
        """Keeps what a unit found."""
        self._found["parts"].setdefault(part, {})[unit] = figures
        self._found["running"] = None
        self._write()

    def leave_out(self, part: str, unit: str, reason: str) -> None:
        """Notes that a unit was not run."""
        self._found["left_out"].setdefault(part, {})[unit] = reason
        self._write()

    def has(self, part: str, unit: str) -> bool:
        """Whether a unit has figures, or has ended a process; one that only failed is tried again."""
        found = self._found["parts"].get(part, {}).get(unit)
        return found is not None and ("failed" not in found or found.get("ended_the_process", False))

    def of(self, part: str) -> dict[str, Figures]:
        """The figures of a part by unit, without those that failed."""
        return {unit: found for unit, found in self._found["parts"].get(part, {}).items() if "failed" not in found}

    def failures(self) -> list[str]:
        """A line for each unit that failed."""
        return [
            f"{part}, {unit}: {found['failed']}"
            for part, units in self._found["parts"].items()
            for unit, found in units.items()
            if "failed" in found
        ]

    def left_out(self) -> list[str]:
        """A line for each unit that was not run."""
        return [
            f"{part}, {unit}: {reason}"
            for part, units in self._found["left_out"].items()
            for unit, reason in units.items()
        ]

    def _write(self) -> None:
        try:
            files.write_whole(self.file, json.dumps(self._found, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{self.file} cannot be written: {error}") from error
