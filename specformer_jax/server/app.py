"""The routes of the server, over an engine that runs."""

from __future__ import annotations

import asyncio
import importlib.resources
import time
from collections.abc import Sequence

import fastapi
from fastapi.responses import HTMLResponse, JSONResponse

from specformer_jax.batch import generation
from specformer_jax.engine import Engine
from specformer_jax.server import errors
from specformer_jax.server.choices import Choices, EventStream, whole
from specformer_jax.server.errors import ApiError, ErrorResponse
from specformer_jax.server.formats import ChatFormat, CompletionFormat, Format
from specformer_jax.server.gate import Gate
from specformer_jax.server.metrics import ServerMetrics
from specformer_jax.server.protocol import COMPLETION_TOKENS, ChatRequest, CompletionRequest
from specformer_jax.version import __version__


def create_app(engine: Engine, api_keys: Sequence[str] = ()) -> fastapi.FastAPI:
    """The ASGI application.

    Args:
      engine: answers the requests; whoever made it stops it.
      api_keys: the keys of which /v1 asks for one; without any it lets everybody in.
    """
    app = fastapi.FastAPI(
        title="SpecFormer",
        version=__version__,
        docs_url=None,  # FastAPI's own pages load their scripts from a CDN
        redoc_url=None,
        responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
    )
    app.state.draining = False  # /health says so while the server shuts down
    errors.install(app)
    lm, started = engine.lm, int(time.time())
    metrics = ServerMetrics(engine, lm.name)
    page = (importlib.resources.files("specformer_jax") / "server" / "page.html").read_text(encoding="utf-8")
    card = {
        "id": lm.name,
        "object": "model",
        "created": started,
        "owned_by": "specformer",
        "max_model_len": engine.max_context,
        "max_draft_length": lm.model.max_draft_length,
    }

    def check_model(name: str) -> None:
        if name != lm.name:
            message = f"there is no model {name!r} here: this server has {lm.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def answer(
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[list[int]],
        most_tokens: int | None,
        logprobs: int | None,
        form: Format,
        http: fastapi.Request,
    ):
        """Runs the prompts; `most_tokens` None lets an answer fill the context."""
        requests = []
        for ids in prompts:
            if reason := generation.too_long(len(ids), engine.max_context):
                raise ApiError(400, reason, code="context_length_exceeded")
            rest = engine.max_context - len(ids)
            requests += body.requests(ids, rest if most_tokens is None else most_tokens, logprobs)
        if len(requests) > engine.config.max_queue:
            message = f"{len(requests)} answers at once are more than this server queues ({engine.config.max_queue})"
            raise ApiError(400, message, param="n", code="invalid_value")
        choices = Choices(engine, requests, metrics.finished)
        if body.stream:
            return EventStream(choices, form, body.n, body.include_usage)
        return await whole(choices, form, body.n, http)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        check_model(name)
        return card

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, http: fastapi.Request):
        check_model(body.model)
        prompts = body.prompts()
        encoded = await asyncio.to_thread(
            lambda: [lm.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
        )
        form = CompletionFormat(lm.tokenizer, lm.name, body.return_tokens)
        return await answer(body, encoded, COMPLETION_TOKENS, body.logprobs, form, http)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, http: fastapi.Request):
        check_model(body.model)
        if not lm.tokenizer.has_chat_template:
            raise ApiError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
        messages = [message.for_template() for message in body.messages]
        ids = await asyncio.to_thread(lm.tokenizer.chat, messages)
        form = ChatFormat(lm.tokenizer, lm.name, body.return_tokens)
        return await answer(body, [ids], None, body.reported, form, http)

    @app.get("/health", response_model=None)
    async def health():
        if app.state.draining:
            return JSONResponse({"status": "draining"}, 503)
        return {"status": "ok"} if engine.stats().healthy else JSONResponse({"status": "unhealthy"}, 503)

    @app.get("/metrics")
    async def show_metrics() -> fastapi.Response:
        return fastapi.Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    app.add_middleware(Gate, api_keys=api_keys)
    return app
