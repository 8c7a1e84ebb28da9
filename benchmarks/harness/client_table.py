"""The table of the clients that `tests/server/clients` runs against a server."""

from __future__ import annotations

from typing import Any


def markdown(found: dict[str, Any]) -> str:
    """A row a client: its version, and what was tried with it."""
    lines = ["| client | version | what it is tried with |", "|---|---|---|"]
    lines += [f"| {row['client']} | {row['version']} | {', '.join(row['checks'])} |" for row in found["clients"]]
    return "\n".join(lines)
