"""Files changed in one place."""

from __future__ import annotations

import json
from pathlib import Path


def edit_json(file: Path, **changes) -> None:
    """Sets keys of a JSON object."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_config(folder: Path, **changes) -> None:
    """Sets keys of a model's config.json."""
    edit_json(folder / "config.json", **changes)


# What a JSON file may hold in place of what it should.
ODD_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    3,
    10**40,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "</s>",
    [],
    [None],
    ["x"],
    {},
    {"a": 1},
)
