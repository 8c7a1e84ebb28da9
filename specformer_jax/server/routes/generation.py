"""OpenAI's completions, chat completions and Responses, and Anthropic's messages."""

from __future__ import annotations

import asyncio

import fastapi

from specformer_jax.server import apis
from specformer_jax.server.errors import ApiError
from specformer_jax.server.protocol.anthropic import DialogueBody, MessagesRequest
from specformer_jax.server.protocol.chat import ChatRequest
from specformer_jax.server.protocol.completions import CompletionRequest
from specformer_jax.server.protocol.responses import ResponsesRequest
from specformer_jax.server.service import Service


def add(app: fastapi.FastAPI, service: Service) -> None:
    """Adds the routes to the app."""

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, http: fastapi.Request):
        return await apis.complete(service, body, http)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, http: fastapi.Request):
        return await apis.chat(service, body, http)

    @app.post("/v1/responses", response_model=None)
    async def responses(body: ResponsesRequest, http: fastapi.Request):
        return await apis.respond(service, body, http)

    @app.post("/v1/messages", response_model=None)
    async def messages(body: MessagesRequest, http: fastapi.Request):
        return await apis.message(service, body, http)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: DialogueBody) -> dict:
        service.check_model(body.model)
        prompt = await asyncio.to_thread(body.as_chat().as_prompt, service.lm.tokenizer)
        return {"input_tokens": len(prompt.ids)}

    @app.get("/v1/responses/{name}", include_in_schema=False)
    @app.delete("/v1/responses/{name}", include_in_schema=False)
    async def stored(name: str):
        message = "this server keeps no answers: send all of the input to POST /v1/responses"
        raise ApiError(404, message, code="not_stored")
