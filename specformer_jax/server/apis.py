"""What each API makes of a body: the core that HTTP's routes and batch files share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import fastapi
from pydantic import BaseModel

from specformer_jax.engine.stops import texts
from specformer_jax.server.answers.chat_format import ChatFormat
from specformer_jax.server.answers.choice_format import CompletionFormat, Shown
from specformer_jax.server.answers.choice_reader import ChoiceReader
from specformer_jax.server.answers.choices import EventStream
from specformer_jax.server.answers.messages_format import MessagesFormat
from specformer_jax.server.answers.responses_format import ResponsesFormat
from specformer_jax.server.protocol.anthropic import MessagesRequest
from specformer_jax.server.protocol.chat import ChatRequest
from specformer_jax.server.protocol.completions import COMPLETION_TOKENS, CompletionRequest
from specformer_jax.server.protocol.generation import GenerationBody
from specformer_jax.server.protocol.responses import ResponsesRequest
from specformer_jax.server.service import Service

Answered = dict[str, Any] | EventStream


async def complete(service: Service, body: CompletionRequest, http: fastapi.Request | None = None) -> Answered:
    """The answer of /v1/completions; `http` tells when the client goes away."""
    service.check_model(body.model)
    tokenizer = service.lm.tokenizer
    prompts = await asyncio.to_thread(body.encode, tokenizer)
    requests = service.requests(body, prompts, COMPLETION_TOKENS, body.logprobs)
    # Prompts that are scored come with their text from the engine.
    echoes = body.echo and body.logprobs is None
    echoed = [texts(tokenizer, r.prompt_ids, r.shown_ids) for r in requests] if echoes else []
    form = CompletionFormat(tokenizer, body.model, _shown(body, len(requests)), ["".join(found) for found in echoed])
    return await service.answer(body, requests, form, http)


async def chat(service: Service, body: ChatRequest, http: fastapi.Request | None = None) -> Answered:
    """The answer of /v1/chat/completions; `http` as in `complete`."""
    service.check_model(body.model)
    tokenizer = service.lm.tokenizer
    prompt = await asyncio.to_thread(body.as_prompt, tokenizer)
    requests = service.requests(body, [prompt.ids], None, body.reported, prompt)
    readers = [ChoiceReader(prompt.reader(), body.parallel_tool_calls) for _ in requests]
    form = ChatFormat(tokenizer, body.model, _shown(body, len(requests)), readers)
    return await service.answer(body, requests, form, http)


async def respond(service: Service, body: ResponsesRequest, http: fastapi.Request | None = None) -> Answered:
    """The answer of /v1/responses; `http` as in `complete`."""
    service.check_model(body.model)
    asked = body.as_chat()
    prompt = await asyncio.to_thread(asked.as_prompt, service.lm.tokenizer)
    requests = service.requests(asked, [prompt.ids], None, None, prompt)
    form = ResponsesFormat(body, ChoiceReader(prompt.reader(), body.parallel_tool_calls))
    return await service.answer(asked, requests, form, http)


async def message(service: Service, body: MessagesRequest, http: fastapi.Request | None = None) -> Answered:
    """The answer of Anthropic's /v1/messages; `http` as in `complete`."""
    service.check_model(body.model)
    asked = body.as_chat(body.max_tokens, body.stream)
    prompt = await asyncio.to_thread(asked.as_prompt, service.lm.tokenizer)
    requests = service.requests(asked, [prompt.ids], None, None, prompt)
    reader = ChoiceReader(prompt.reader(), asked.parallel_tool_calls)
    form = MessagesFormat(body.model, len(requests[0].prompt_ids), reader)
    return await service.answer(asked, requests, form, http)


class Api(NamedTuple):
    """A kind of body, and what answers it."""

    body: type[BaseModel]
    answer: Callable[..., Awaitable[Answered]]


APIS = {
    "/v1/completions": Api(CompletionRequest, complete),
    "/v1/chat/completions": Api(ChatRequest, chat),
    "/v1/responses": Api(ResponsesRequest, respond),
}


def _shown(body: GenerationBody, choices: int) -> Shown:
    options = body.stream_options
    return Shown(
        choices=choices,
        choices_per_prompt=body.n,
        tokens=body.return_tokens,
        usage=options is not None and options.include_usage,
        running_usage=options is not None and options.continuous_usage_stats,
    )
