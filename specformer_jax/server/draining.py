"""The process around the app: uvicorn that drains the engine before it stops."""

from __future__ import annotations

import logging
import sys
import threading
from types import FrameType
from typing import NamedTuple

import fastapi
import uvicorn

from specformer_jax.engine import Engine


class Tls(NamedTuple):
    """Files in PEM format: the certificate, with those between it and the root behind it, and its key."""

    certificate: str
    key: str | None


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Whether a line of the access log is about somebody's request, and not about a probe or a scrape."""
    match record.args:  # client, method, path, version and status, as uvicorn logs them
        case (_, _, "/health" | "/metrics", *_):
            return False
    return True


class Server(uvicorn.Server):
    """uvicorn, but the first signal drains: what is being answered is finished, what comes is answered with 503."""

    def __init__(self, app: fastapi.FastAPI, engine: Engine, grace: float, log_level: str, tls: Tls | None = None):
        """
        Args:
          app: answers the requests, and says at /health that the server shuts down.
          engine: is stopped by the signal.
          grace: how many seconds answers may still take after the signal.
          log_level: how much uvicorn says.
          tls: what the server proves itself with; without it talks plain HTTP.
        """
        # What is left after the grace time has been cancelled, and needs only a moment to say so.
        config = uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=5, server_header=False)
        if tls is not None:
            config.ssl_certfile, config.ssl_keyfile = tls.certificate, tls.key
        super().__init__(config)
        logging.getLogger("uvicorn.access").addFilter(_is_worth_a_line)
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
