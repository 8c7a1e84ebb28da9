"""Answers of no tokens: most need no engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from specformer_jax.engine.request import Delta, Request, Usage
from specformer_jax.server.answers.choices import Choices


class PromptChoices:
    """`Choices` of one token that nobody asked for, of which only the prompt's scores are shown."""

    def __init__(self, choices: Choices):
        self._choices = choices

    def __len__(self) -> int:
        return len(self._choices)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """The one delta of each choice; see `Choices.deltas`."""
        async for index, delta in self._choices.deltas():
            if delta.finish_reason is not None:
                usage = Usage(delta.usage.prompt_tokens, seconds=delta.usage.seconds)
                yield index, Delta((), usage, "length", prompt=delta.prompt)

    def cancel(self) -> None:
        """Frees what they hold."""
        self._choices.cancel()


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
