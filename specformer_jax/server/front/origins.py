"""CORS: the pages of which origins a browser lets read the answers."""

from __future__ import annotations

from collections.abc import Sequence

import fastapi
from starlette.middleware.cors import CORSMiddleware

_LOOPBACK = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
READABLE = ("x-request-id", "retry-after")  # headers that pages may read beside the usual ones


def allow(app: fastapi.FastAPI, origins: Sequence[str]) -> None:
    """Lets pages on this machine read the answers, and those of these origins; "*" is every page.

    It has to be the last middleware that is added, so that it answers a browser's question before a key is asked for.
    """
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_origin_regex=_LOOPBACK,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=list(READABLE),
    )
