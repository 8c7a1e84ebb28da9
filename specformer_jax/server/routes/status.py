"""What the server says of itself: its model, its health and its metrics."""

from __future__ import annotations

import time

import fastapi
from fastapi.responses import JSONResponse

from specformer_jax.server.service import Service


def add(app: fastapi.FastAPI, service: Service) -> None:
    """Adds the routes to the app."""
    started = int(time.time())

    def card(name: str) -> dict:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "specformer",
            "root": service.lm.name,
            "max_model_len": service.engine.max_context,
            "max_draft_length": service.lm.model.max_draft_length,
        }

    @app.get("/v1/models")
    @app.get("/v1/models/", include_in_schema=False)
    async def models() -> dict:
        return {"object": "list", "data": [card(name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        service.check_model(name)
        return card(name)

    @app.get("/health", response_model=None)
    @app.head("/health", include_in_schema=False, response_model=None)
    async def health():
        if service.draining:
            return JSONResponse({"status": "draining"}, 503)
        return {"status": "ok"} if service.engine.stats().healthy else JSONResponse({"status": "unhealthy"}, 503)

    @app.get("/metrics")
    async def show_metrics() -> fastapi.Response:
        return fastapi.Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
