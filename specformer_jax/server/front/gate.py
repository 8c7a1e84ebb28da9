"""What is checked before anything of a request is read: its key, its size and what it says it is."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specformer_jax.server.errors import ApiError

MAX_BODY = 4 * 2**20  # bytes
OPEN = frozenset(("/", "/health", "/metrics", "/openapi.json"))  # nobody needs a key there,
OPEN_FOLDER = "/page/"  # nor for what the page consists of
_TOO_LARGE = f"the body is larger than {MAX_BODY} bytes"


class Gate:
    """Answers 401 to whoever has no key, 413 to bodies that are too large, and 415 to those that are not JSON."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]):
        """
        Args:
          app: answers what the gate lets through.
          api_keys: the keys of which all but the `OPEN` routes ask for one; without any they let everybody in.
        """
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if (refusal := self._refuse(scope["method"], scope["path"], headers)) is not None:
            await refusal.response()(scope, receive, send)
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

    def _refuse(self, method: str, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        """Why the request may not come in, None if it may."""
        if self._keys and path not in OPEN and not path.startswith(OPEN_FOLDER) and not self._has_key(headers):
            message = "give a key of this server as `Authorization: Bearer KEY`"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY:
            return ApiError(413, _TOO_LARGE, code="body_too_large")
        # A page of another origin can send anything else without asking first.
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if method == "POST" and kind != b"application/json":
            sent = f"as {kind.decode('latin-1')!r}" if kind else "without a content type"
            message = f"the body came {sent}: send it as JSON, with the header `Content-Type: application/json`"
            return ApiError(415, message, code="unsupported_media_type")
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if b"x-api-key" in headers:  # where Anthropic's clients put it
            scheme, key = b"bearer", headers[b"x-api-key"]
        # Every key is compared, in constant time, so that the time tells nothing.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)
