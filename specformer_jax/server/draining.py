"""The process around the app: uvicorn that drains the engine before it stops."""

from __future__ import annotations

import sys
import threading
from types import FrameType

import fastapi
import uvicorn

from specformer_jax.engine import Engine


class Server(uvicorn.Server):
    """uvicorn, but the first signal drains: what is being answered is finished, what comes is answered with 503."""

    def __init__(self, app: fastapi.FastAPI, engine: Engine, grace: float, log_level: str):
        """
        Args:
          app: answers the requests, and says at /health that the server shuts down.
          engine: is stopped by the signal.
          grace: how many seconds answers may still take after the signal.
          log_level: how much uvicorn says.
        """
        # What is left after the grace time has been cancelled, and needs only a moment to say so.
        super().__init__(uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=5, server_header=False))
        self._app, self._engine, self._grace = app, engine, grace
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler: a second signal cancels what is left, whose clients are told; a third does not wait."""
        self._signals += 1
        if self._signals > 2:
            self.should_exit = self.force_exit = True
            return
        grace = self._grace if self._signals == 1 else 0.0
        self._app.state.service.draining = True
        print(f"shutting down: answers have {grace:g} seconds to finish", file=sys.stderr, flush=True)
        threading.Thread(target=self._drain, args=(grace,), name="drain", daemon=True).start()

    def _drain(self, grace: float) -> None:
        self._engine.stop(grace)
        self.should_exit = True
