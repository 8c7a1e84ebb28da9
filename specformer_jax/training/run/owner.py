"""One process, or one group of them, trains in a run's folder at a time."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from specformer_jax import files
from specformer_jax.errors import UserError

LOCK, HOLDER = "lock", "holder.json"  # the lock goes with its process, however that ends; who it was stands beside it
# What a run leaves; the checkpoints first: without them nothing is resumed.
LEFT = (
    "checkpoints", "run.json", "metrics.jsonl", "data_report.json", "left_out.jsonl", "curves.png", "report.html",
    "tensorboard",
)  # fmt: skip


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Holds the folder of a run, which is made if it is not there; on several hosts the first one does.

    Raises:
      UserError: another process holds it (naming it), or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{folder} is in use by {_holder(folder)}: stop it, or name another --run") from error
    except OSError as error:
        raise UserError(f"the run cannot be kept in {folder}: {error}") from error
    try:
        me = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        files.write_whole(folder / HOLDER, json.dumps(me) + "\n")
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        holder = files.read_json_object(folder / HOLDER)
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (UserError, KeyError):  # it has just begun, or is about to end
        return "another process"


def set_aside(folder: Path) -> Path | None:
    """Moves what a run has left in its folder to before-1, before-2, ... in it, so that a new one can begin there.

    Returns:
      Where it is now; None if there was nothing.

    Raises:
      UserError: it cannot be moved.
    """
    left = [folder / name for name in LEFT if (folder / name).exists()]
    if not left:
        return None
    before = folder / f"before-{1 + len(list(folder.glob('before-*')))}"
    try:
        before.mkdir()
        for path in left:
            path.rename(before / path.name)
    except OSError as error:
        raise UserError(f"what {folder} holds cannot be moved to {before}: {error}") from error
    return before
