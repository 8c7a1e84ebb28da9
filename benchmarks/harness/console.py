"""What the commands read from their flags and say while they run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from specformer_jax.errors import UserError


def numbers(flag: str, text: str, least: int) -> list[int]:
    """The numbers of a flag that takes several, with commas between them.

    >>> numbers("--batch-sizes", "1, 4,4", least=1)
    [1, 4]

    Raises:
      UserError: something else, or a number below `least`.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if any(not part.isdigit() or int(part) < least for part in parts) or (least and not parts):
        raise UserError(f"{flag} {text!r} must be numbers from {least} on, with commas between them")
    return list(dict.fromkeys(int(part) for part in parts))


def add_answer_arguments(parser: argparse.ArgumentParser, temperature: str | None = None) -> None:
    """What the commands that time whole answers have in common; `temperature` is a hint about that flag."""
    parser.add_argument("--temperature", type=float, default=0.0, help=temperature)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--json", metavar="FILE", help="write every figure there")


def say(line: str) -> None:
    """Progress, on stderr: stdout is for the report."""
    print(line, file=sys.stderr, flush=True)


def show(found: dict[str, Any], table: str, path: str | Path | None) -> None:
    """Prints the table of a report; the file gets every figure."""
    print(table)
    if path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
