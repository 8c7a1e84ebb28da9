"""Files that are there whole or not at all, and JSON files that may hold anything."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from specformer_jax.errors import UserError


def write_whole(path: str | os.PathLike, text: str) -> None:
    """The file gets all of the text, or stays what it was; processes that write the same do not meet.

    Raises:
      OSError: it cannot be written.
    """
    path = Path(path)
    half = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with half.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        half.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)
        raise


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      UserError: the file is missing or unreadable, or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object but a {type(value).__name__}: it is another file or damaged")
    return value
