"""What clients may send: the fields of OpenAI's completions and chat completions that this server honours."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from specformer_jax.config import SamplingParams
from specformer_jax.engine.request import Request
from specformer_jax.server.errors import ApiError

COMPLETION_TOKENS = 16  # OpenAI's default length of a completion; a chat answer may fill the context

# Fields of OpenAI's that say nothing about the answer.
_IGNORED = frozenset(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"))
# Fields of OpenAI's that this server has not, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """null is as good as not given."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class StreamOptions(_Body):
    """`stream_options`.

    Attributes:
      include_usage: end the stream with a chunk that holds the usage.
      include_obfuscation: OpenAI's padding of chunks; there is none here.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationBody(_Body):
    """The fields that both kinds of request have; docs/serving.md lists what they mean.

    Attributes:
      model: the model's name, as /v1/models lists it.
      seed: with the prompt and the other values it fixes the answer, in bfloat16 up to near ties; choice i of `n` is
        sampled with seed + i, modulo 2**32. A random one where none is given.
      stop: strings that end the answer; it does not contain them.
      speculative: "auto" lets the server choose the drafts of each step, "off" drafts none, a number is the most a
        step. It changes the speed; the answer is the model's own in any case.
      return_tokens: add a `specformer` object to each choice: its tokens, which of them were accepted drafts, kappa.
      raw: whether the answer continues the prompt's text (see `Request`).
    """

    raw: ClassVar[bool] = False

    model: str
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=16)] = []
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    speculative: Literal["auto", "off"] | Annotated[int, Field(ge=0)] = "auto"
    return_tokens: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for field, neutral in _NEUTRAL.items():
            if data.get(field) is not None and data[field] not in neutral:
                message = f"{field} is not supported here: leave it out"
                raise ApiError(400, message, param=field, code="unsupported_field")
        return {k: v for k, v in data.items() if k not in _IGNORED and k not in _NEUTRAL}

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def requests(self, prompt_ids: list[int], most_tokens: int, logprobs: int | None) -> list[Request]:
        """The engine's requests for one prompt, one for each of `n` choices.

        Args:
          prompt_ids: the token ids of the prompt.
          most_tokens: the most tokens of an answer, where the client set no limit.
          logprobs: what to report of each token's likelihood, as in `Request`.

        Raises:
          UserError: some values do not go together.
        """
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return [
            Request(
                tuple(prompt_ids),
                SamplingParams(
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    min_p=self.min_p,
                    seed=(seed + i) % 2**32,
                    max_new_tokens=most_tokens if self.max_tokens is None else self.max_tokens,
                ),
                speculative=self.speculative,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                logprobs=logprobs,
                raw=self.raw,
            )
            for i in range(self.n)
        ]


class CompletionRequest(GenerationBody):
    """The body of /v1/completions.

    Attributes:
      prompt: a text, a list of texts, token ids, or a list of such lists.
      logprobs: how many of the likeliest tokens to list beside each token of the answer.
    """

    raw: ClassVar[bool] = True

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    logprobs: int | None = Field(None, ge=0, le=20)

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt, text or token ids."""
        prompt: Any = self.prompt  # the type of an item does not narrow the list's
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class TextPart(_Body):
    """A part of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_empty(cls, data: Any) -> Any:
        """Clients send back the answers they were given, with lists of what these did not hold."""
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if k not in ("tool_calls", "annotations") or v != []}

    def for_template(self) -> dict[str, str]:
        """As chat templates read it; OpenAI's developer is what models know as system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationBody):
    """The body of /v1/chat/completions.

    Attributes:
      max_completion_tokens: the newer name of max_tokens.
      logprobs: report the log-probability of each token of the answer.
      top_logprobs: how many of the likeliest tokens to list beside it.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    @property
    def reported(self) -> int | None:
        """What the engine's requests take as `logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None
