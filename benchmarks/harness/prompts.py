"""The prompts that the benchmarks answer."""

from __future__ import annotations

from pathlib import Path

from specformer_jax.batch import generation, prompt_files
from specformer_jax.batch.conversations import Conversation
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel

BUILTIN = Path(__file__).parent.parent / "prompts.jsonl"
CATEGORY = 10  # prompts.jsonl holds its categories one after the other, ten prompts each


def read_builtin() -> list[Conversation]:
    """The prompts of `benchmarks/prompts.jsonl`, one of each category in turn."""
    found = prompt_files.read_prompts(BUILTIN)
    return [conversation for i in range(CATEGORY) for conversation in found[i::CATEGORY]]


def encode(lm: LanguageModel, source: str) -> list[list[int]]:
    """Token ids of the first turn of each prompt of a file, or of those that are `builtin`.

    Raises:
      UserError: a file that cannot be read, or a prompt that the context does not hold.
    """
    conversations = read_builtin() if source == "builtin" else prompt_files.read_prompts(source)
    prompts = [generation.encode_turn(lm, c, [], raw=False) for c in conversations]
    for c, prompt in zip(conversations, prompts, strict=True):
        if reason := generation.misfit(len(prompt), lm.config.context):
            raise UserError(f"{source}, {c.id}: {reason}")
    return prompts
