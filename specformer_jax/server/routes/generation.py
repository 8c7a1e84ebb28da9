"""OpenAI's completions and chat completions."""

from __future__ import annotations

import asyncio

import fastapi

from specformer_jax.server.answers.choice_format import ChatFormat, CompletionFormat, Shown
from specformer_jax.server.protocol.chat import ChatRequest
from specformer_jax.server.protocol.completions import COMPLETION_TOKENS, CompletionRequest
from specformer_jax.server.protocol.generation import GenerationBody
from specformer_jax.server.service import Service


def add(app: fastapi.FastAPI, service: Service) -> None:
    """Adds the routes to the app."""
    tokenizer = service.lm.tokenizer

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, http: fastapi.Request):
        service.check_model(body.model)
        prompts = await asyncio.to_thread(body.encode, tokenizer)
        requests = service.requests(body, prompts, COMPLETION_TOKENS, body.logprobs)
        form = CompletionFormat(tokenizer, body.model, _shown(body, len(requests)))
        return await service.answer(body, requests, form, http)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, http: fastapi.Request):
        service.check_model(body.model)
        ids = await asyncio.to_thread(body.encode, tokenizer)
        requests = service.requests(body, [ids], None, body.reported)
        form = ChatFormat(tokenizer, body.model, _shown(body, len(requests)))
        return await service.answer(body, requests, form, http)


def _shown(body: GenerationBody, choices: int) -> Shown:
    options = body.stream_options
    return Shown(
        choices=choices,
        choices_per_prompt=body.n,
        tokens=body.return_tokens,
        usage=options is not None and options.include_usage,
        running_usage=options is not None and options.continuous_usage_stats,
    )
