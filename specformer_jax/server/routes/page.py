"""The page to try a chat in a browser: its files, as they lie in the package."""

from __future__ import annotations

from pathlib import Path

import fastapi
from starlette.exceptions import HTTPException

from specformer_jax.server.service import Service

FOLDER = Path(__file__).parents[1] / "page"
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",  # a module that says it is anything else is not run
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
# What a model says is untrusted. Should any of it come through as HTML, this runs no script of it, loads nothing from
# elsewhere and sends nothing there; texts cannot even be turned into HTML.
_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'self'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)
_HEADERS = {
    "Content-Security-Policy": "; ".join(_POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # another version may be served tomorrow
}


def add(app: fastapi.FastAPI, service: Service) -> None:
    """Adds the routes to the app; the page asks the others, so it needs nothing of the service."""
    files = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*") if path.suffix in _TYPES}
    contents = {name: (path.read_bytes(), _TYPES[path.suffix]) for name, path in files.items()}

    @app.get("/", include_in_schema=False)
    async def index() -> fastapi.Response:
        return await file("index.html")

    @app.get("/page/{name:path}", include_in_schema=False)
    async def file(name: str) -> fastapi.Response:
        if name not in contents:
            raise HTTPException(404)
        content, kind = contents[name]
        return fastapi.Response(content, media_type=kind, headers=_HEADERS)
