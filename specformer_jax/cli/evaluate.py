"""`train.py evaluate`: how many tokens a head's drafts let the target commit a pass, on prompts of one's own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from specformer_jax import files
from specformer_jax.batch import prompt_files
from specformer_jax.batch.generation import encode_prompt
from specformer_jax.config import SamplingParams
from specformer_jax.decoding.pass_counts import PassCounts
from specformer_jax.errors import UserError, require
from specformer_jax.loading import head_checkpoint
from specformer_jax.loading.language_model import DTYPES, LanguageModel, load
from specformer_jax.training import evaluate
from specformer_jax.training.data.documents import Document

Counts = dict[str, list[PassCounts]]  # "offline" and "decoded", each at several draft lengths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train.py evaluate`."""
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="auto", help="auto or a directory of export")
    parser.add_argument("--lookup", action="store_true", help="with prompt lookup beside the head, as decoding has it")
    parser.add_argument("--prompts", required=True, nargs="+", help="prompt files, JSONL")
    parser.add_argument("--draft-length", type=int, nargs="+", help="default: 1 to the head's J")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--limit", type=int, help="only the first prompts of each file")
    parser.add_argument("--decode", action="store_true", help="decode really at every k, instead of once")
    parser.add_argument("--json", metavar="FILE", help="also write the report there")
    parser.add_argument("--record", action="store_true", help="write how often drafts were right into the head")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Runs the verb; user mistakes raise `UserError`."""
    _check(options)
    lm = load(options.target, draft=options.draft, lookup=options.lookup, dtype=options.dtype)
    draft_lengths = options.draft_length or list(range(1, lm.model.max_draft_length + 1))
    evaluate.check_draft_lengths(lm, draft_lengths)
    found: dict[str, Counts] = {}
    for file in options.prompts:
        found[Path(file).name] = _count(lm, file, draft_lengths, options)
        _print_counts(file, found[Path(file).name])
    whole = found[Path(options.prompts[0]).name]
    if len(found) > 1:
        whole = found["all"] = {
            kind: [
                PassCounts.total(same_k) for same_k in zip(*(counts[kind] for counts in found.values()), strict=True)
            ]
            for kind in ("offline", "decoded")
        }
        _print_counts("all files", whole)
    if options.json:
        _write_report(found, options)
    if options.record:
        head_checkpoint.record_acceptance(options.draft, whole["offline"][-1].report()["acceptance"])


def _check(options: argparse.Namespace) -> None:
    """Refuses before the model is loaded what would fail after it has answered."""
    names = [Path(file).name for file in options.prompts]
    twice = sorted({name for name in names if names.count(name) > 1})
    others_draft = options.draft in ("auto", "ngram") or options.lookup
    SamplingParams(temperature=options.temperature, max_new_tokens=options.max_new_tokens)
    require(
        (options.batch_size >= 1, f"--batch-size {options.batch_size} must be at least 1"),
        (
            all(k >= 1 for k in options.draft_length or ()),
            f"--draft-length {options.draft_length} must be at least 1",
        ),
        (options.limit is None or options.limit >= 1, f"--limit {options.limit} must be at least 1"),
        (
            not (options.record and options.draft_length),
            "--record counts every draft of a head: leave out --draft-length",
        ),
        (
            not (options.record and others_draft),
            "--record writes what a head drafts alone into --draft DIR: name that, and leave out --lookup",
        ),
        (
            not twice,
            f"two prompt files are called {', '.join(twice[:1])}, as the report would call both: rename one",
        ),
        (
            not options.json or Path(options.json).absolute().parent.is_dir(),
            f"the report cannot be written to {options.json}: make its folder first",
        ),
    )


def _count(lm: LanguageModel, file: str, draft_lengths: Sequence[int], options: argparse.Namespace) -> Counts:
    """The counts over the prompts of one file."""
    sampling_params = SamplingParams(temperature=options.temperature, max_new_tokens=options.max_new_tokens)
    prompts = [encode_prompt(lm, c.turns[:1], False) for c in prompt_files.read_prompts(file)][: options.limit]
    # Real decoding gives the answers; the other draft lengths are then counted along them.
    longest = max(draft_lengths)
    decoded_longest, answers = evaluate.decode(lm, prompts, sampling_params, longest, options.batch_size)
    documents = [
        Document(str(i), np.array(prompt + answer, np.int32), len(prompt), options.temperature)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    seeds = [sampling_params.seed] * len(documents) if options.temperature else None
    offline = evaluate.offline(lm, documents, draft_lengths, seeds)
    decoded = []
    if options.decode:
        shorter = [k for k in draft_lengths if k != longest]
        decoded = [evaluate.decode(lm, prompts, sampling_params, k, options.batch_size)[0] for k in shorter]
    return {"offline": offline, "decoded": [*decoded, decoded_longest]}


def _print_counts(name: str, kinds: Counts) -> None:
    print(name)
    for kind, counts in kinds.items():
        for count in counts:
            shares = " ".join(f"{x:.3f}" for x in count.acceptance)
            print(
                f"  {kind:8} k={count.draft_length} kappa {count.kappa:.3f}  accepted by position {shares}"
                f"  ({count.answers} answers)"
            )


def _write_report(found: dict[str, Counts], options: argparse.Namespace) -> None:
    report = {"target": options.target, "draft": options.draft, "temperature": options.temperature}
    report["files"] = {
        name: {kind: [count.report() for count in counts] for kind, counts in kinds.items()}
        for name, kinds in found.items()
    }
    try:
        files.write_whole(options.json, json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"the report cannot be written to {options.json}: {error}") from error
