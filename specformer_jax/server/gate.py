"""What is checked before anything of a request is read: its key and its size."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specformer_jax.server.errors import ApiError

MAX_BODY = 4 * 2**20  # bytes
_TOO_LARGE = f"the body is larger than {MAX_BODY} bytes"


class Gate:
    """Answers 401 under /v1 to whoever has no key, and 413 to bodies that are too large."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]):
        """
        Args:
          app: answers what the gate lets through.
          api_keys: the keys of which /v1 asks for one; without any it lets everybody in.
        """
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["path"].startswith("/v1") and self._keys and not self._has_key(headers):
            message = "give a key of this server as `Authorization: Bearer KEY`"
            ask = {"WWW-Authenticate": "Bearer"}
            await ApiError(401, message, code="invalid_api_key", headers=ask).response()(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY:
            await ApiError(413, _TOO_LARGE, code="body_too_large").response()(scope, receive, send)
            return
        read = 0

        async def receive_some() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY:  # sent in chunks, whose sizes no header tells
                raise HTTPException(413, _TOO_LARGE)
            return message

        await self._app(scope, receive_some, send)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # Every key is compared, in constant time, so that the time tells nothing.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)
