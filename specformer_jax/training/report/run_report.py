"""report.html of a run: what it trains on, its curves, where its time goes, what the head drafts. No network needed."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import jinja2

from specformer_jax import files
from specformer_jax.errors import UserError
from specformer_jax.training import metrics
from specformer_jax.training.report import curves, data_report
from specformer_jax.training.run import run_record

NAME = "report.html"
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=lambda name: name is not None and name.endswith(".html"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def write(run: str | Path) -> Path:
    """Writes the report of a run from the run's own files, and its curves as curves.png where matplotlib is installed.

    Returns:
      Where it is.

    Raises:
      UserError: there is no run, or the report cannot be written.
    """
    run = Path(run)
    found = contents(run)
    figure = curves.draw(found["rows"])
    picture = None if figure is None else curves.svg(figure)
    text = TEMPLATES.get_template(NAME).render(found, curves=picture)
    try:
        files.write_whole(run / NAME, text)
        if figure is not None:
            figure.savefig(run / "curves.png", dpi=80)
    except OSError as error:
        raise UserError(f"the report cannot be written to {run}: {error}") from error
    return run / NAME


def contents(run: Path) -> dict[str, Any]:
    """What the files of a run say, for a template."""
    rows = metrics.read(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    stored = run_record.read(run)
    counted = [row for row in rows if "held_out" in row]
    parts: dict[str, float] = {}
    for row in rows:
        for name, seconds in row.get("seconds", {}).items():
            parts[name] = parts.get(name, 0.0) + seconds
    return {
        "name": run.resolve().name,
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "config": stored["config"],
        "settings": _settings(stored["config"]),
        "target": stored["target"],
        "offline": stored.get("offline"),
        "data": data_report.read(run),
        "newest": rows[-1] if rows else None,
        "tokens": sum(row["tokens"] for row in rows),
        "held_out": counted,
        "best": max(counted, key=lambda row: (row["held_out"]["kappa"], row["step"])) if counted else None,
        "parts": parts,
        "rows": rows,
    }


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Every field of a configuration by the name that `--set` takes."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        inner = {f"{name}.{field}": one for field, one in value.items()} if isinstance(value, dict) else {name: value}
        found |= inner
    return found
