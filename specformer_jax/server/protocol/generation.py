"""The fields that all requests for text have, and the engine's requests that they become."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from specformer_jax.config import MOST_BAD_WORDS, SamplingParams
from specformer_jax.engine.request import Request
from specformer_jax.grammars import grammar
from specformer_jax.loading.tokenizer import Tokenizer
from specformer_jax.server.errors import ApiError
from specformer_jax.server.protocol.body import Body, without_unserved
from specformer_jax.server.protocol.structure import ResponseFormat, StructuredOutputs, TextFormat

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Words = tuple[tuple[int, ...], ...]
Penalty = Annotated[float, Field(ge=-2, le=2)]

# What vLLM called the parts of `structured_outputs` before.
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


class StreamOptions(Body):
    """`stream_options`.

    Attributes:
      include_usage: end the stream with a chunk that holds the usage.
      continuous_usage_stats: let every chunk of such a stream hold the usage so far.
      include_obfuscation: OpenAI's padding of chunks; there is none here.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class SamplingFields(Body):
    """The fields that all requests for text have; docs/serving.md lists what they mean.

    Attributes:
      model: the model's name, as /v1/models lists it.
      top_k: 0 and -1 are off.
      seed: with the prompt and the other values it fixes the answer, in bfloat16 up to near ties; choice i of `n` is
        sampled with seed + i, modulo 2**32. A random one where none is given.
      stop: strings that end the answer; it does not contain them.
      stop_token_ids: tokens that end the answer; its text does not contain them.
      ignore_eos: the model's end tokens do not end the answer.
      min_tokens: nothing but stop strings ends the answer before it has so many tokens.
      logit_bias: what is added to the logits of tokens, by their ids.
      repetition_penalty: divides the logits of tokens in prompt or answer, or multiplies them if negative; 1 is off.
      frequency_penalty: is taken from the logit of a token as often as the answer has it.
      presence_penalty: is taken from the logits of tokens that the answer has.
      bad_words: texts that the answer does not have, at its begin or within, with a space before them or without.
      speculative: "auto" lets the server choose the drafts of each step, "off" drafts none, a number is the most a
        step. It changes the speed; the answer is the model's own in any case.
      skip_special_tokens: false shows the special tokens of the answer.
      truncate_prompt_tokens: keep so many tokens of a prompt, the last; -1 keeps what the context holds beside
        max_tokens.
    """

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=16)] = Field(default_factory=list)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] = Field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, lt=2**31)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)] = Field(
        default_factory=dict
    )
    repetition_penalty: float | None = Field(None, gt=0, le=1e3)
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    bad_words: Annotated[list[Annotated[str, Field(pattern=r"\S")]], Field(max_length=MOST_BAD_WORDS // 2)] = Field(
        default_factory=list
    )
    skip_special_tokens: bool = True
    truncate_prompt_tokens: Literal[-1] | Annotated[int, Field(ge=1)] | None = None
    speculative: Literal["auto", "off"] | Annotated[int, Field(ge=0)] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        return without_unserved(data, cls.model_fields) if isinstance(data, dict) else data

    @field_validator("logit_bias")
    @classmethod
    def _are_ids(cls, bias: dict[str, float]) -> dict[str, float]:
        if not all(token.isascii() and token.isdecimal() and len(token) < 10 for token in bias):
            raise ValueError("its keys must be ids of tokens")
        return bias


class GenerationBody(SamplingFields):
    """The fields of completions and chat completions.

    Attributes:
      max_tokens: the most tokens of an answer; 0 asks for none.
      n: how many choices.
      response_format, structured_outputs: what the answer is to look like, in OpenAI's and in vLLM's words.
      return_tokens: add a `specformer` object to each choice: its tokens, which of them were accepted drafts, kappa.
    """

    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    n: int = Field(1, ge=1, le=128)
    response_format: ResponseFormat = Field(default=TextFormat(type="text"))
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_tokens: bool = False

    @model_validator(mode="before")
    @classmethod
    def _take_former_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        asked = {name: data[former] for former, name in _GUIDED.items() if data.get(former) is not None}
        given = data.get("structured_outputs") or {}
        if not asked or not isinstance(given, dict):
            return data
        return {k: v for k, v in data.items() if k not in _GUIDED} | {"structured_outputs": given | asked}

    @property
    def raw(self) -> bool:
        """Whether the answer continues the prompt's text (see `Request`)."""
        return False

    def grammar(self, tokenizer: Tokenizer) -> str | None:
        """What the engine's requests take as `grammar`.

        Raises:
          ApiError, UserError: it is none, or there are two.
        """
        rule = self.response_format.rule
        asked = self.structured_outputs.as_grammar if self.structured_outputs else None
        if rule is not None and asked is not None:
            message = "response_format and structured_outputs say what an answer looks like: leave out one of both"
            raise ApiError(400, message, param="structured_outputs", code="invalid_value")
        return asked if rule is None else grammar.of_parts(f"start: {rule}")

    def token_sequences(self, tokenizer: Tokenizer) -> Words:
        """The tokens of the bad words: without a space before them, and with one where that makes it another word."""
        sequences: list[tuple[int, ...]] = []
        for word in self.bad_words:
            plain, spaced = (tuple(tokenizer.encode(before + word.lstrip(), special=False)) for before in ("", " "))
            sequences.append(plain)
            if spaced[:1] != plain[:1] and len(spaced) == len(plain):  # vLLM's rule
                sequences.append(spaced)
        return tuple(dict.fromkeys(sequences))

    def requests(
        self,
        prompt_ids: Sequence[int],
        most_tokens: int,
        logprobs: int | None,
        defaults: Mapping[str, float],
        bad_words: Words = (),
    ) -> list[Request]:
        """The engine's requests for one prompt, one for each of `n` choices; no token is asked for as one.

        Args:
          prompt_ids: the token ids of the prompt.
          most_tokens: the most tokens of an answer, where the client set no limit.
          logprobs: what to report of each token's likelihood, as in `Request`.
          defaults: how to sample where the client does not say, by the names of the fields.
          bad_words: of `token_sequences`.

        Raises:
          UserError: some values do not go together.
        """
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")

        def chosen(name: str, otherwise: float) -> float:
            given = getattr(self, name)
            return defaults.get(name, otherwise) if given is None else given

        most = most_tokens if self.max_tokens is None else self.max_tokens
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return [
            Request(
                tuple(prompt_ids),
                SamplingParams(
                    temperature=chosen("temperature", 1.0),
                    top_k=max(int(chosen("top_k", 0)), 0),
                    top_p=chosen("top_p", 1.0),
                    min_p=chosen("min_p", 0.0),
                    seed=(seed + i) % 2**32,
                    max_new_tokens=max(most, 1),
                    logit_bias=tuple((int(token), amount) for token, amount in self.logit_bias.items()),
                    repetition_penalty=chosen("repetition_penalty", 1.0),
                    frequency_penalty=chosen("frequency_penalty", 0.0),
                    presence_penalty=chosen("presence_penalty", 0.0),
                    bad_words=bad_words,
                ),
                speculative=self.speculative,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                stop_token_ids=tuple(self.stop_token_ids),
                ignore_eos=self.ignore_eos,
                min_tokens=self.min_tokens,
                logprobs=logprobs,
                raw=self.raw,
                streams=self.stream,
            )
            for i in range(self.n)
        ]
