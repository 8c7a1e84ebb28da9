"""How an answer is shown to a client, whole or as server-sent events: what each API says in its own words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from specformer_jax.engine.request import Delta
from specformer_jax.server.errors import ApiError


class Format(Protocol):
    """One object an answer; it knows what of a stream has been shown."""

    def whole(self, choices: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        """The whole answer, from the deltas of each choice."""

    def opening(self) -> Iterable[str]:
        """The events that begin a stream."""

    def gained(self, index: int, delta: Delta) -> Iterable[str]:
        """The events for what a choice gained; none where there is nothing to show."""

    def closing(self) -> Iterable[str]:
        """The events that end a stream in which every choice has ended."""

    def failed(self, error: ApiError) -> Iterable[str]:
        """The events that end a stream which cannot go on."""


def event(body: dict[str, Any], name: str | None = None) -> str:
    """One server-sent event, with its name where the API gives events names."""
    return ("" if name is None else f"event: {name}\n") + f"data: {json.dumps(body)}\n\n"
