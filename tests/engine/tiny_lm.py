"""The tiny model as a `LanguageModel`, whose tokens are letters."""

from __future__ import annotations

import dataclasses

from specformer_jax.config import DraftConfig, SamplingParams
from specformer_jax.drafters.ngram import WithLookup
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.loading.text_stream import TextStream
from specformer_jax.planning.planner import Plan
from tests import tiny

DRAFT_LENGTHS = (0, 2)


class Letters:
    """Token 0 is "a", token 1 is "b", ...; the end token is no text."""

    eos_ids = tiny.CONFIG.eos_ids
    vocab_size = tiny.CONFIG.vocab_size
    has_chat_template = True

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def chat(self, messages) -> list[int]:
        return self.encode("".join(message["content"] for message in messages))

    def decode(self, ids, after=()) -> str:
        return "".join(chr(ord("a") + id) for id in ids if id not in self.eos_ids)

    def stream(self, after=()) -> TextStream:
        return TextStream(self.decode)


def make() -> LanguageModel:
    """A head with all it can have that bears on the cache: the token hook, the attention to the context, lookup."""
    draft = DraftConfig(max_draft_length=3, next_token_hook=True, attends_context=True)
    model, params = tiny.make(draft)
    model = dataclasses.replace(model, drafter=WithLookup.around(model.drafter))
    return LanguageModel("tiny", model, params, Letters(), None)  # type: ignore[arg-type]


def naive(lm: LanguageModel, prompt, sampling_params: SamplingParams) -> list[int]:
    """The answer of plain decoding without cache, window or batch."""
    return tiny.naive(lm.model, lm.params, list(prompt), sampling_params)


@dataclasses.dataclass
class Cycle:
    """A planner that takes another k at every call."""

    draft_lengths: tuple[int, ...] = DRAFT_LENGTHS
    calls: int = 0

    def choose(self, size, rows, *, explore) -> Plan:
        self.calls += 1
        cap = max(cap for _, cap in rows)
        allowed = [k for k in self.draft_lengths if k <= cap]
        return Plan(allowed[self.calls % len(allowed)], 1.0)

    def observe(self, request, drafted, accepted) -> None:
        request.observe(drafted, accepted)
