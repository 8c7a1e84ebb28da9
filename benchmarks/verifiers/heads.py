"""What both benchmarks of verification begin with: common flags, a head, and the model under each verification."""

from __future__ import annotations

import argparse
import dataclasses

from specformer_jax.batch import generation
from specformer_jax.cli import command_line
from specformer_jax.decoding.verification.kind import Verification
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import DTYPES, LanguageModel, load


def add_arguments(parser: argparse.ArgumentParser, temperatures: list[float], max_new_tokens: int) -> None:
    """The flags; the temperatures and the length of an answer are their defaults."""
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="auto", metavar="DIR")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--draft-length", type=int, default=4, help="k, the same for all")
    parser.add_argument("--temperatures", nargs="+", type=float, default=temperatures)
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument("--json", metavar="FILE")


def load_head(options: argparse.Namespace) -> LanguageModel:
    """The target and its head, which drafts alone, without lookup.

    Raises:
      UserError: there is no head, or it has not so many slots.
    """
    command_line.keep_compiled_programs()
    lm = load(options.target, draft=options.draft, lookup=False, dtype=options.dtype)
    if lm.model.drafter is None:
        raise UserError(f"no draft head is shipped for {options.target}: name one with --draft")
    generation.check_draft_length(lm, options.draft_length)
    return lm


def judged(lm: LanguageModel, verification: str) -> LanguageModel:
    """The same model under a verification, by its name."""
    return dataclasses.replace(lm, model=dataclasses.replace(lm.model, verification=Verification(verification)))
