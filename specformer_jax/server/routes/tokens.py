"""Text to tokens and back, as vLLM's clients ask for it."""

from __future__ import annotations

import asyncio

import fastapi

from specformer_jax.errors import require
from specformer_jax.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from specformer_jax.server.service import Service


def add(app: fastapi.FastAPI, service: Service) -> None:
    """Adds the routes to the app."""
    tokenizer = service.lm.tokenizer

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict:
        service.check_model(body.model)

        def encode() -> list[int]:
            if body.prompt is None:
                return body.as_prompt(tokenizer).ids
            return tokenizer.encode(body.prompt, special=body.add_special_tokens)

        ids = await asyncio.to_thread(encode)
        texts = [tokenizer.token_text(id) for id in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": service.engine.max_context, "tokens": ids, "token_strs": texts}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict:
        service.check_model(body.model)
        size = tokenizer.vocab_size
        require((all(id < size for id in body.tokens), f"a token is not within the vocabulary of {size}"))
        return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict:
        return {
            "vocab_size": tokenizer.vocab_size,
            "eos_token_ids": list(tokenizer.eos_ids),
            "fingerprint": tokenizer.fingerprint,
            "chat_template": tokenizer.chat_template,
            "max_model_len": service.engine.max_context,
        }
