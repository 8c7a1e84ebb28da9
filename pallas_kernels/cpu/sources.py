"""The native sources and their fingerprint; setup.py reads this before anything is installed."""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent


def compiled() -> list[Path]:
    """What the compiler is given."""
    return sorted(FOLDER.rglob("*.cc"))


def read() -> list[Path]:
    """All that a build depends on."""
    return [*compiled(), *sorted(FOLDER.rglob("*.h")), *sorted(FOLDER.rglob("*.inc"))]


def fingerprint() -> str:
    """Tells a library that was built from other sources than those that are here."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in read())).hexdigest()[:16]
