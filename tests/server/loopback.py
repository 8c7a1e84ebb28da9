"""Serving an engine on loopback from within a test."""

import contextlib
import dataclasses
import http.client
import json
import socket
import threading

import uvicorn

from specformer_jax.engine import Engine
from specformer_jax.engine.config import EngineConfig
from specformer_jax.server.app import create_app

ENGINE = EngineConfig(rows=4, max_context=192, chunk=32, max_queue=600)


@dataclasses.dataclass
class Served:
    """A running server.

    Attributes:
      app: its application.
      engine: behind it.
      port: on 127.0.0.1.
    """

    app: object
    engine: Engine
    port: int

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def request(self, method, path, body=None, headers=None):
        """(status, headers, body) of one request; a dict or a list is sent as JSON."""
        if isinstance(body, dict | list):
            body = json.dumps(body)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return response.status, response.headers, response.read()


@contextlib.contextmanager
def running(engine, **options):
    """Serves an engine from another thread."""
    app = create_app(engine, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Served(app, engine, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
