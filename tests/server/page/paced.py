"""A scripted engine that speaks as slowly as a test wants, with a context as small as it wants."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from specformer_jax.engine.request import Delta, Request
from tests.server.wire.scripted import TEMPLATE, ScriptedEngine, ScriptedHandle


class PacedHandle(ScriptedHandle):
    """Its deltas come from a thread, each when it may."""

    def __init__(self, deltas: list[Delta], may_go_on: threading.Semaphore | None):
        super().__init__(deltas)
        self._may_go_on, self._gone = may_go_on, False

    def subscribe(self, callback) -> None:
        threading.Thread(target=self._say, args=(callback,), daemon=True).start()

    def _say(self, callback) -> None:
        for delta in self._deltas:
            if self._may_go_on is not None:
                self._may_go_on.acquire()
            if self._gone:
                break
            with contextlib.suppress(RuntimeError):  # the server's loop has ended with the test
                callback(delta)

    def cancel(self) -> None:
        self._gone = True


class PacedEngine(ScriptedEngine):
    """Answers with `text`; within `paced()` only so many deltas as it is allowed."""

    def __init__(self, template: str = TEMPLATE, marks: tuple[str, ...] = ()):
        super().__init__(template, marks)
        self._may_go_on: threading.Semaphore | None = None

    @contextlib.contextmanager
    def paced(self) -> Iterator[threading.Semaphore]:
        """What has to be released for each delta to come; afterwards all come at once again."""
        self._may_go_on = threading.Semaphore(0)
        try:
            yield self._may_go_on
        finally:
            self._may_go_on.release(10_000)
            self._may_go_on = None

    def submit(self, request: Request) -> PacedHandle:
        return PacedHandle(super().submit(request)._deltas, self._may_go_on)
