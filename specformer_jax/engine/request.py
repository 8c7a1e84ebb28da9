"""What a caller and the engine say to each other: a request goes in, deltas come out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from specformer_jax.batch import generation
from specformer_jax.config import SamplingParams
from specformer_jax.decoding.logprobs import MAX_TOP
from specformer_jax.decoding.pass_counts import PassCounts
from specformer_jax.decoding.processors import MOST_BIASED, Bias
from specformer_jax.errors import UserError, require
from specformer_jax.grammars.matcher import Thoughts
from specformer_jax.loading.language_model import LanguageModel

NOT_NUMBERS = "the model's logits are no numbers (NaN): its weights or their arithmetic are broken"
FINISH_REASONS = ("stop", "length", "cancelled", "deadline", "error")


class QueueFull(Exception):
    """The engine's queue holds as many waiting requests as it may.

    Attributes:
      retry_after: seconds after which the queue is likely to have a free place.
    """

    def __init__(self, retry_after: float):
        super().__init__(f"the queue is full: try again in {retry_after:.0f} seconds")
        self.retry_after = retry_after


class Stopped(Exception):
    """The engine is shutting down and takes no new requests."""


class Failed(Stopped):
    """The engine cannot go on after a failure, and takes no new requests."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to answer.

    Attributes:
      prompt_ids: the token ids of the prompt, at least one.
      sampling_params: how the answer is sampled; with the prompt they fix every token of it.
      speculative: "auto" lets the planner choose the drafts of each step, "off" drafts none, a number is the most
        drafts a step. It changes the speed, never the tokens.
      stop: strings that end the answer; they are not part of its text.
      stop_token_ids: tokens that end the answer, besides the target's end tokens.
      ignore_eos: the target's end tokens do not end the answer.
      min_tokens: neither end tokens nor stop tokens are chosen before the answer has so many tokens.
      logprobs: None reports no log-probabilities; a number reports the chosen token's, and those of so many of the
        likeliest tokens beside it (0 or more).
      prompt_logprobs: the prompt's tokens are reported as well, in the same way; all of it is read for that, whatever
        the cache holds.
      answers: false where nothing but that is wanted: the request ends without a token.
      priority: requests with a lower number are admitted first; each number more is worth 30 seconds of waiting.
      timeout: how many seconds after its submission the answer is cut; None waits for ever.
      shown_ids: special tokens that are text of the answer; the others are left out.
      grammar: what the answer follows, as `grammars.grammar` writes it; None lets it say anything.
      thoughts: what a thinking model thinks first, which follows no grammar; None where it does not think.
      raw: the answer continues the text of the prompt, so its first word keeps the space before it.
      streams: someone reads along: while such a request is in flight calls are short, and its deltas come steadily.
    """

    prompt_ids: tuple[int, ...]
    sampling_params: SamplingParams = SamplingParams()
    speculative: str | int = "auto"
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False
    answers: bool = True
    priority: int = 0
    timeout: float | None = None
    shown_ids: frozenset[int] = frozenset()
    grammar: str | None = None
    thoughts: Thoughts | None = None
    raw: bool = False
    streams: bool = True

    def ruled_out(self, eos_ids: Sequence[int]) -> list[Bias]:
        """What keeps the answer from ending before it has its least tokens."""
        if self.min_tokens == 0:
            return []
        ends = {*self.stop_token_ids, *(() if self.ignore_eos else eos_ids)}
        return [Bias(token, -math.inf, len(self.prompt_ids) + self.min_tokens) for token in sorted(ends)]

    @property
    def continued(self) -> tuple[int, ...]:
        """The tokens whose text the answer continues."""
        return self.prompt_ids if self.raw else ()

    def __post_init__(self):
        require(
            (len(self.prompt_ids) > 0, "the prompt is empty"),
            (
                self.speculative in ("auto", "off")
                or (isinstance(self.speculative, int) and self.speculative >= 0 and self.speculative is not True),
                f"speculative {self.speculative!r} must be 'auto', 'off' or a number of drafts",
            ),
            (all(self.stop), "a stop string must not be empty"),
            (
                0 <= self.min_tokens <= self.sampling_params.max_new_tokens,
                f"min_tokens {self.min_tokens} must be within 0 and the most tokens of the answer,"
                f" {self.sampling_params.max_new_tokens}",
            ),
            (
                self.grammar is None or not (self.min_tokens or self.ignore_eos),
                "min_tokens and ignore_eos do not go with a grammar, which says where an answer ends",
            ),
            (self.logprobs is None or self.logprobs >= 0, f"logprobs {self.logprobs} must be 0 or more"),
            (
                not self.prompt_logprobs or self.logprobs is not None,
                "prompt_logprobs needs logprobs, the number of likeliest tokens",
            ),
            (self.answers or self.prompt_logprobs, "a request without an answer needs prompt_logprobs"),
            (self.timeout is None or self.timeout > 0, f"timeout {self.timeout} must be above 0 seconds"),
        )


def check_request(request: Request, lm: LanguageModel, max_context: int) -> None:
    """Raises UserError where the model cannot answer the request within so many positions."""
    if reason := generation.too_long(len(request.prompt_ids), max_context):
        raise UserError(reason)
    vocab_size = lm.config.vocab_size
    kept = min(MAX_TOP, vocab_size)
    require(
        (
            all(0 <= token < vocab_size for token in request.prompt_ids),
            f"a token of the prompt is not within the vocabulary of {vocab_size}",
        ),
        (
            all(token < vocab_size for token, _ in request.sampling_params.logit_bias),
            f"a token of logit_bias is not within the vocabulary of {vocab_size}",
        ),
        (
            all(token < vocab_size for word in request.sampling_params.bad_words for token in word),
            f"a token of bad_words is not within the vocabulary of {vocab_size}",
        ),
        (
            len(request.sampling_params.logit_bias) + len(request.ruled_out(lm.config.eos_ids)) <= MOST_BIASED,
            f"logit_bias and the tokens that min_tokens rules out are more than {MOST_BIASED}",
        ),
        (
            request.logprobs is None or request.logprobs <= kept,
            f"logprobs {request.logprobs} is more than the {kept} that are kept",
        ),
        (
            lm.model.truncation or not request.sampling_params.truncates,
            "top-k, top-p and min-p are not compiled into this engine's model: load one that has them",
        ),
    )
    if isinstance(request.speculative, int):
        generation.check_draft_length(lm, request.speculative)


@dataclasses.dataclass(frozen=True)
class TokenOutput:
    """One committed token.

    Attributes:
      id: the token's number in the vocabulary.
      text: the text that became final with the token: "" inside a character, and nothing of a stop string.
      from_draft: whether the token was an accepted draft.
      logprob: the token's log-probability under the target's raw logits; None unless asked for.
      top: the likeliest tokens and their log-probabilities, as many as asked for.
    """

    id: int
    text: str
    from_draft: bool
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Usage:
    """What an answer took.

    Attributes:
      prompt_tokens: how many tokens the prompt has.
      cached_tokens: how many of the prompt's tokens were found in the cache.
      completion_tokens: how many tokens the answer has, its end token included.
      steps: how many passes of the target decoded the answer; those that read the prompt are not counted.
      drafted_tokens: how many drafts were proposed.
      accepted_per_position: how often the draft at each position was accepted and committed.
      queue_time: seconds from the submission until it was in a row.
      time_to_first_token: seconds from the submission to the first token.
      seconds: seconds from the submission to the last token.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()
    queue_time: float = 0.0
    time_to_first_token: float = 0.0
    seconds: float = 0.0

    @property
    def passes(self) -> PassCounts:
        """The counts of the answer's decode passes."""
        return PassCounts.of(self.completion_tokens, self.steps, self.accepted_per_position)

    @property
    def kappa(self) -> float:
        """Tokens committed per target pass."""
        return self.passes.kappa


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a request gained since the last delta.

    Attributes:
      tokens: the new tokens, in order; there may be none in the last delta.
      usage: what the answer took so far, and altogether in the last delta.
      finish_reason: why the answer ended, one of `FINISH_REASONS`, in the last delta; None before.
      error: what went wrong, where the reason is "error".
      prompt: the prompt's tokens, with those of the answer's first pass, where the request asks for them.
    """

    tokens: tuple[TokenOutput, ...]
    usage: Usage
    finish_reason: str | None = None
    error: str | None = None
    prompt: tuple[TokenOutput, ...] = ()

    @property
    def text(self) -> str:
        """The text of the new tokens."""
        return "".join(token.text for token in self.tokens)
