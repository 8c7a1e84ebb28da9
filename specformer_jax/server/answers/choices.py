"""From an HTTP request to the engine and back: the choices of one answer, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol

import fastapi
from fastapi.responses import StreamingResponse

from specformer_jax.engine import Engine
from specformer_jax.engine.request import NOT_NUMBERS, Delta, Request
from specformer_jax.server.answers.format import Format
from specformer_jax.server.errors import ApiError

log = logging.getLogger(__name__)


class AnyChoices(Protocol):
    """The choices of one answer, wherever they come from; see `Choices`."""

    def __len__(self) -> int: ...

    def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """The index of a choice and a delta of it, as they come, until every choice has ended."""

    def cancel(self) -> None:
        """Frees what they hold."""


class Choices:
    """The requests in the engine that one HTTP request asked for."""

    def __init__(self, engine: Engine, requests: Sequence[Request], finished: Callable[[Delta], None]):
        """Submits them all, or none.

        Args:
          engine: answers the requests.
          requests: one for each choice.
          finished: is called with the last delta of each, on the engine's thread.

        Raises:
          UserError, QueueFull, Stopped: the engine refuses one of them.
        """
        self._queue: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._handles = []
        try:
            for request in requests:
                self._handles.append(engine.submit(request))
        except Exception:
            self.cancel()
            raise

        def subscriber(index: int) -> Callable[[Delta], None]:
            def receive(delta: Delta) -> None:
                if delta.finish_reason is not None:
                    finished(delta)
                loop.call_soon_threadsafe(self._queue.put_nowait, (index, delta))

            return receive

        for index, handle in enumerate(self._handles):
            handle.subscribe(subscriber(index))

    def __len__(self) -> int:
        return len(self._handles)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """The index of a choice and a delta of it, as they come, until every choice has ended.

        Raises:
          ApiError: the engine gave a choice up.
        """
        left = len(self._handles)
        while left:
            index, delta = await self._queue.get()
            if delta.finish_reason in ("cancelled", "deadline", "error"):
                raise _given_up(delta)
            left -= delta.finish_reason is not None
            yield index, delta

    def cancel(self) -> None:
        """Frees what they hold; nothing happens to those that have ended."""
        for handle in self._handles:
            handle.cancel()


async def whole(choices: AnyChoices, form: Format, http: fastapi.Request | None) -> dict[str, Any]:
    """The answer as one object; a client that goes away cancels it."""
    deltas: list[list[Delta]] = [[] for _ in range(len(choices))]
    with _cancelled_when_gone(choices, http):
        async for index, delta in choices.deltas():
            deltas[index].append(delta)
    return form.whole(deltas)


@contextlib.contextmanager
def _cancelled_when_gone(choices: AnyChoices, http: fastapi.Request | None) -> Iterator[None]:
    async def watch(http: fastapi.Request) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        choices.cancel()

    watcher = None if http is None else asyncio.create_task(watch(http))
    try:
        yield
    finally:
        if watcher is not None:
            watcher.cancel()
        choices.cancel()


class EventStream(StreamingResponse):
    """The answer as server-sent events; a client that goes away cancels it, whenever that is."""

    def __init__(self, choices: AnyChoices, form: Format):
        self._choices = choices
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(choices, form), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._choices.cancel()


async def _events(choices: AnyChoices, form: Format) -> AsyncIterator[str]:
    for event in form.opening():
        yield event
    try:
        async for index, delta in choices.deltas():
            for event in form.gained(index, delta):
                yield event
    except ApiError as error:
        for event in form.failed(error):
            yield event
        return
    for event in form.closing():
        yield event


def _given_up(delta: Delta) -> ApiError:
    match delta.finish_reason:
        case "cancelled":
            return ApiError(503, "the answer was cancelled: the server is shutting down", code="shutting_down")
        case "deadline":
            return ApiError(503, "the answer took longer than it may", code="deadline")
    if delta.error == NOT_NUMBERS:
        return ApiError(500, NOT_NUMBERS, code="not_numbers")
    log.error("the engine gave a request up: %s", delta.error)
    return ApiError(500, "the engine failed while it made this answer: try again", code="engine_error")
