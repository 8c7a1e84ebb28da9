"""The tiny model as a `LanguageModel`, whose tokens are letters."""

from __future__ import annotations

import dataclasses

import tokenizers

from specformer_jax.config import DraftConfig, SamplingParams
from specformer_jax.decoding.state import BINS
from specformer_jax.drafters.ngram import WithLookup
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.loading.text_stream import TextStream
from specformer_jax.planning.calibration import Calibration
from specformer_jax.planning.planner import FixedDrafts, Plan
from tests import tiny

DRAFTS = 3


class Letters:
    """Token 0 is "a", token 1 is "b", ...; the end token is no text."""

    eos_ids = tiny.CONFIG.eos_ids
    vocab_size = tiny.CONFIG.vocab_size

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def chat(self, messages) -> list[int]:
        return self.encode("".join(message["content"] for message in messages))

    def decode(self, ids, after=()) -> str:
        return "".join(chr(ord("a") + id) for id in ids if id not in self.eos_ids)

    def as_json(self) -> str:
        letters = {chr(ord("a") + id): id for id in range(self.vocab_size)}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        return backend.to_str()

    def stream(self, after=(), shown=()) -> TextStream:
        return TextStream(self.decode)


def make() -> LanguageModel:
    """A head with all it can have that bears on the cache: the token hook, the attention to the context, lookup."""
    draft = DraftConfig(max_draft_length=DRAFTS, next_token_hook=True, attends_context=True)
    model, params = tiny.make(draft)
    model = dataclasses.replace(model, drafter=WithLookup.around(model.drafter))
    return LanguageModel("tiny", model, params, Letters(), None)  # type: ignore[arg-type]


def naive(lm: LanguageModel, prompt, sampling_params: SamplingParams) -> list[int]:
    """The answer of plain decoding without cache, window or batch."""
    return tiny.naive(lm.model, lm.params, list(prompt), sampling_params)


def fixed(drafts: int = DRAFTS) -> FixedDrafts:
    """A planner that takes so many drafts a row at every call."""
    return FixedDrafts(drafts, Calibration(DRAFTS, BINS))


class Cycle:
    """A planner that takes another budget at every call, and drafts in every other round of them."""

    def __init__(self):
        self.calibration, self.draft_cap, self.calls = Calibration(DRAFTS, BINS), DRAFTS, 0

    def choose(self, sizes, rows) -> Plan:
        self.calls += 1
        around, at = divmod(self.calls, len(sizes))
        self.draft_cap = DRAFTS * (around % 2)
        return Plan(sizes[at], self.draft_cap, 1.0, 0.0)
