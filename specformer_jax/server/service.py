"""What the routes share: the engine with its names and counts, and how it is asked."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import fastapi

from specformer_jax.engine import Engine
from specformer_jax.engine.request import Request, check_request
from specformer_jax.server.answers.choices import AnyChoices, Choices, EventStream, whole
from specformer_jax.server.answers.format import Format
from specformer_jax.server.answers.unasked import UnaskedChoices
from specformer_jax.server.errors import ApiError
from specformer_jax.server.metrics import ServerMetrics
from specformer_jax.server.protocol.dialogue import ChatPrompt
from specformer_jax.server.protocol.generation import GenerationBody


class Service:
    """A served model.

    Attributes:
      engine: answers the requests; whoever made it stops it.
      lm: the engine's model.
      names: what clients may call it; answers and metrics take the first.
      sampling_defaults: how answers are sampled where a client does not say.
      metrics: what /metrics shows.
      draining: whether the server shuts down; /health says so.
    """

    def __init__(self, engine: Engine, names: Sequence[str], sampling_defaults: Mapping[str, float]):
        self.engine, self.lm = engine, engine.lm
        self.names, self.sampling_defaults = tuple(names) or (engine.lm.name,), sampling_defaults
        self.metrics = ServerMetrics(engine, self.name)
        self.draining = False

    @property
    def name(self) -> str:
        """What answers and metrics call the model."""
        return self.names[0]

    def check_model(self, name: str | None) -> None:
        """Raises ApiError where another model is asked for; None asks for the one that is there."""
        if name is not None and name not in self.names:
            message = f"there is no model {name!r} here: this server has {' and '.join(map(repr, self.names))}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def requests(
        self,
        body: GenerationBody,
        prompts: Sequence[list[int]],
        most_tokens: int | None,
        logprobs: int | None,
        chat: ChatPrompt | None = None,
    ) -> list[Request]:
        """The engine's requests for the prompts, the choices of each one after the other.

        Args:
          body: what the client asks for.
          prompts: the token ids of each prompt.
          most_tokens: the most tokens of an answer, where the client set no limit; None is what the context holds.
          logprobs: what to report of each token's likelihood, as in `Request`.
          chat: the prompt of a chat, which says how its answer is read.

        Raises:
          ApiError: a prompt is too long, or there are more requests than the engine queues.
          UserError: some values do not go together.
        """
        shown = chat.shown_ids if chat else frozenset[int]()
        given = functools.partial(
            dataclasses.replace,
            shown_ids=shown if body.skip_special_tokens else self.lm.tokenizer.special_ids,
            grammar=body.grammar(self.lm.tokenizer),
            thoughts=chat.thoughts if chat else None,
        )
        bad_words = body.token_sequences(self.lm.tokenizer)
        requests = []
        for prompt in prompts:
            ids = self._truncated(prompt, body)
            rest = self.engine.max_context - len(ids)
            if rest < 1:
                raise ApiError(400, self._too_long(len(ids)), code="context_length_exceeded")
            most = rest if most_tokens is None else most_tokens
            asked = body.requests(ids, most, logprobs, self.sampling_defaults, bad_words)
            requests += [given(request) for request in asked]
        if len(requests) > self.engine.config.max_queue:
            most = self.engine.config.max_queue
            message = f"{len(requests)} answers at once are more than this server queues ({most})"
            raise ApiError(400, message, param="n", code="invalid_value")
        return requests

    async def answer(
        self, body: GenerationBody, requests: Sequence[Request], form: Format, http: fastapi.Request | None
    ) -> dict[str, Any] | EventStream:
        """Runs the requests of a body; the answer as one object, or as a stream of events.

        Args:
          body: what the client asks for.
          requests: of `requests`.
          form: shows the answer.
          http: tells when the client goes away; None has no client that might.

        Raises:
          UserError, QueueFull, Stopped: the engine refuses one of them.
        """
        if body.max_tokens == 0 and not any(request.prompt_logprobs for request in requests):
            for request in requests:
                check_request(request, self.lm, self.engine.max_context)
            choices: AnyChoices = UnaskedChoices(requests)
        else:
            for grammar in {request.grammar for request in requests if request.grammar is not None}:
                await asyncio.to_thread(self.engine.learn, grammar)
            choices = Choices(self.engine, requests, self.metrics.finished)
        return EventStream(choices, form) if body.stream else await whole(choices, form, http)

    def _truncated(self, ids: list[int], body: GenerationBody) -> list[int]:
        kept = body.truncate_prompt_tokens
        if kept is None:
            return ids
        return ids[-kept:] if kept > 0 else ids[-max(self.engine.max_context - max(body.max_tokens or 1, 1), 1) :]

    def _too_long(self, length: int) -> str:
        # Clients look for these words, to shorten what they send.
        most = self.engine.max_context
        return f"This model's maximum context length is {most} tokens, but the prompt has {length}: shorten it"
