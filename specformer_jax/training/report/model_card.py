"""README.md of a head: what it is, what it was trained on and what it brings, from the files that its run left."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from specformer_jax import files
from specformer_jax.errors import UserError
from specformer_jax.loading import head_checkpoint
from specformer_jax.training.report import run_report
from specformer_jax.version import __version__

NAME = "README.md"


def write(run: str | Path, head: str | Path, evaluation: str | Path | None = None) -> Path:
    """Writes a head's card beside it.

    Args:
      run: the folder of the run that the head is of.
      head: the exported head, which gets the card.
      evaluation: the report that `train.py evaluate --json` wrote of this head, or None.

    Returns:
      Where the card is.

    Raises:
      UserError: no run or head is there, the evaluation is of another head, or the card cannot be written.
    """
    run, head = Path(run), Path(head)
    config = head_checkpoint.read_config(head)
    counted = None if evaluation is None else read_evaluation(evaluation, config)
    found = run_report.contents(run) | {"head": config, "evaluation": counted, "tables": _tables(counted)}
    found |= {"version": __version__, "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")}
    text = run_report.TEMPLATES.get_template("card.md").render(found)
    try:
        files.write_whole(head / NAME, text)
    except OSError as error:
        raise UserError(f"the card cannot be written to {head}: {error}") from error
    return head / NAME


def read_evaluation(path: str | Path, config: dict[str, Any]) -> dict[str, Any]:
    """The report of an evaluation.

    Args:
      path: what `train.py evaluate --json` wrote.
      config: the `config.json` of the head that it has to be of.

    Raises:
      UserError: it cannot be read, or is of another head.
    """
    report = files.read_sealed(path)
    if not isinstance(report.get("files"), dict) or report.get("weights") != config.get("weights"):
        raise UserError(f"{path} is no evaluation of this head: run `train.py evaluate --json {path}` again")
    return report


def _tables(evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A row for each file of prompts: its counts at every k, drafted along the answers."""
    if evaluation is None:
        return []
    return [{"prompts": name, "counts": counts["offline"]} for name, counts in evaluation["files"].items()]
