"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


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
