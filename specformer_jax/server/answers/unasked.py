"""Answers of no tokens, to prompts that are not scored: they need no engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from specformer_jax.engine.request import Delta, Request, Usage


class UnaskedChoices:
    """What `Choices` is to requests for no token: each ends at once, at its length."""

    def __init__(self, requests: Sequence[Request]):
        self._requests = requests

    def __len__(self) -> int:
        return len(self._requests)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """The one delta of each choice."""
        for index, request in enumerate(self._requests):
            yield index, Delta((), Usage(len(request.prompt_ids)), "length")

    def cancel(self) -> None:
        """There is nothing to free."""
