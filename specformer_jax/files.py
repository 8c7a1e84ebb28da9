"""Files that are there whole or not at all, files that grow by whole lines, JSON objects that know their own digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from specformer_jax.errors import UserError

SEAL = "sha256"  # the key under which a sealed object keeps the digest of its other keys


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """The file gets all of the content, or stays what it was; processes that write the same do not meet.

    Raises:
      OSError: it cannot be written.
    """
    path = Path(path)
    half = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with half.open("wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())
        half.replace(path)
    except BaseException:  # Ctrl-C, too
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


def read_sealed(path: str | os.PathLike) -> dict[str, Any]:
    """The object that a JSON file holds, as it was before `seal`.

    Raises:
      UserError: the file is missing or unreadable, or does not hold what was written there.
    """
    return unseal(str(path), read_json_object(path))


def seal(fields: dict[str, Any]) -> dict[str, Any]:
    """The object with the digest of its fields among them, which `unseal` compares.

    >>> unseal("here", seal({"a": 1}))
    {'a': 1}
    """
    return fields | {SEAL: _digest(fields)}


def unseal(where: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that `seal` was given; an object without a digest, of an earlier version say, as it is.

    Args:
      where: what holds the object, to begin the error's sentence with.
      fields: the object as it was read.

    Raises:
      UserError: the fields are not those that were sealed.
    """
    rest = {name: value for name, value in fields.items() if name != SEAL}
    if SEAL in fields and fields[SEAL] != _digest(rest):
        raise UserError(f"{where} is not what was written there: it is damaged, or was changed by hand")
    return rest


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def write_with_digest(path: str | os.PathLike, text: str) -> None:
    """Writes a file whole, and its digest beside it, as `sha256sum` would; `check_digest` compares.

    Raises:
      OSError: it cannot be written.
    """
    path = Path(path)
    # Without a digest the file may be anything; with one it is never another than that of the digest.
    _digest_file(path).unlink(missing_ok=True)
    write_whole(path, text)
    write_whole(_digest_file(path), f"{hashlib.sha256(text.encode()).hexdigest()}  {path.name}\n")


def check_digest(path: str | os.PathLike) -> None:
    """Raises UserError if there is a digest beside the file and it is another's.

    Raises:
      OSError: the file cannot be read.
    """
    path = Path(path)
    if not has_digest(path):
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _digest_file(path).read_bytes().split()[:1] != [digest.encode()]:
        raise UserError(f"{path} is not what was written there: {_digest_file(path).name} beside it has another digest")


def has_digest(path: str | os.PathLike) -> bool:
    """Whether there is a digest beside the file."""
    return _digest_file(Path(path)).exists()


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.{SEAL}")


def whole_lines(path: str | os.PathLike) -> list[bytes]:
    """The lines of a file that grows, each with its line break; none if the file is not there.

    A last line without a line break is what a killed process left half-written: it is left out.

    Raises:
      OSError: the file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    # Not `splitlines`, for which a lone carriage return ends a line, too.
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def cut_torn_line(path: str | os.PathLike) -> None:
    """Takes a half-written last line out of a file, so that whole ones can be added to it again.

    Raises:
      OSError: the file cannot be read or written.
    """
    size = sum(map(len, whole_lines(path)))
    if Path(path).exists() and Path(path).stat().st_size > size:
        os.truncate(path, size)
