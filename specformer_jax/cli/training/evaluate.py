"""`train.py evaluate`: how many tokens a head's drafts let the target commit a pass, on prompts of one's own."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from specformer_jax import files
from specformer_jax.batch import omissions, prompt_files
from specformer_jax.batch.conversations import Conversation, read_conversations
from specformer_jax.batch.generation import encode_turn, misfit
from specformer_jax.batch.omissions import Omission
from specformer_jax.cli import command_line, dialogues
from specformer_jax.config import LOOKUPS, SamplingParams
from specformer_jax.decoding.pass_counts import PassCounts
from specformer_jax.decoding.state import BROKEN_REASON
from specformer_jax.errors import UserError, require
from specformer_jax.loading import head_checkpoint
from specformer_jax.loading.language_model import DTYPES, LanguageModel, load
from specformer_jax.planning.forecasts import Forecasts
from specformer_jax.training import evaluate
from specformer_jax.training.data.documents import Document
from specformer_jax.training.report.progress import AnswerProgress

Counts = dict[str, list[PassCounts]]  # "offline" and "decoded", each at several draft lengths
SEED = 0


class Found(NamedTuple):
    """What was counted along the answers to a file, what the head forecast there, and what of the file was left out."""

    counts: Counts
    forecasts: Forecasts
    left_out: list[Omission]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train.py evaluate`."""
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="auto", help="auto or a directory of export")
    parser.add_argument("--lookup", action="store_true", help="with prompt lookup beside the head, as decoding has it")
    parser.add_argument("--prompts", required=True, nargs="+", metavar="SOURCE", help=dialogues.SOURCE)
    dialogues.add_arguments(parser)
    dialogues.add_turns_argument(parser)
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
    dialogues.check(options)
    command_line.keep_compiled_programs()
    lm = load(options.target, draft=options.draft, lookup=options.lookup, dtype=options.dtype)
    draft_lengths = options.draft_length or list(range(1, lm.model.max_draft_length + 1))
    evaluate.check_draft_lengths(lm, draft_lengths)
    found: dict[str, Found] = {}
    for file in options.prompts:
        found[Path(file).name] = _count(lm, file, draft_lengths, options)
        _print_counts(file, found[Path(file).name])
    whole = found[Path(options.prompts[0]).name]
    if len(found) > 1:
        same_k = {kind: zip(*(one.counts[kind] for one in found.values()), strict=True) for kind in whole.counts}
        totals = {kind: [PassCounts.total(counts) for counts in same] for kind, same in same_k.items()}
        left_out = [omission for one in found.values() for omission in one.left_out]
        whole = found["all"] = Found(totals, Forecasts.together([one.forecasts for one in found.values()]), left_out)
        _print_counts("all files", whole)
    counted = whole.counts["offline"][-1]
    if options.record and not counted.steps:
        raise UserError("no answer has two tokens, so no draft was judged: there is nothing to record")
    if options.json:
        _write_report(found, options)
    if options.record:
        head_checkpoint.record_acceptance(options.draft, counted.report()["acceptance"])


def _check(options: argparse.Namespace) -> None:
    """Refuses before the model is loaded what would fail after it has answered."""
    names = [Path(file).name for file in options.prompts]
    twice = sorted({name for name in names if names.count(name) > 1})
    others_draft = options.draft in ("auto", *LOOKUPS) or options.lookup
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


def _count(lm: LanguageModel, file: str, draft_lengths: Sequence[int], options: argparse.Namespace) -> Found:
    """The counts over the dialogues of one file.

    Raises:
      UserError: the file cannot be read, or none of its dialogues can be answered.
    """
    read, left_out = read_conversations(file, options.system)
    conversations, not_asked = dialogues.chosen_turns(read[: options.limit], options.turns)
    # Real decoding gives the answers; the other draft lengths are then counted along them.
    longest = max(draft_lengths)
    decoded_longest, documents, not_answered = _answer(lm, file, conversations, longest, options)
    if not documents:
        raise UserError(f"none of the prompts in {file} can be answered: {not_answered[0].reason}")
    seeds = [SEED] * len(documents) if options.temperature else None
    with contextlib.closing(AnswerProgress(f"{file}, drafts along the answers", len(documents))) as shown:
        offline = evaluate.offline(lm, documents, draft_lengths, seeds, on_tokens=shown.show)
    decoded = []
    if options.decode:
        decoded = [_answer(lm, file, conversations, k, options)[0] for k in draft_lengths if k != longest]
    beyond = [Omission(c.id, "row", 1, "beyond --limit") for c in read[len(conversations) :]]
    omitted = [*left_out, *beyond, *not_asked, *not_answered]
    counts = {"offline": offline.passes, "decoded": [*decoded, decoded_longest]}
    return Found(counts, offline.forecasts, omitted)


def _answer(
    lm: LanguageModel, file: str, conversations: Sequence[Conversation], k: int, options: argparse.Namespace
) -> tuple[PassCounts, list[Document], list[Omission]]:
    """Decodes every turn with k drafts a step: the counts, the answers, and the turns that have none."""
    sampling_params = SamplingParams(temperature=options.temperature, max_new_tokens=options.max_new_tokens, seed=SEED)
    counts, documents, left_out = [], list[Document](), list[Omission]()
    said: dict[str, list[str]] = {c.id: [] for c in conversations}  # the answers so far

    def leave_out(c: Conversation, turn: int, reason: str) -> None:
        part, count = ("turn", len(c.turns) - turn) if turn else ("row", 1)
        left_out.append(Omission(c.id, part, count, reason))

    for turn, having_it in prompt_files.rounds(conversations):
        asked: list[tuple[Conversation, list[int]]] = []
        for c in having_it:
            if len(said[c.id]) < turn:  # the turn before has no answer
                continue
            try:
                ids = encode_turn(lm, c, said[c.id], options.raw)
                reason = misfit(len(ids), lm.config.context)
            except UserError as error:
                reason = str(error)
            if reason is None:
                asked.append((c, ids))
            else:
                leave_out(c, turn, reason)
        what = f"{file}, k={k}" + (f", turn {turn + 1}" if turn else "")
        with contextlib.closing(AnswerProgress(what, len(asked))) as shown:
            prompts = [ids for _, ids in asked]
            count, answers = evaluate.decode(lm, prompts, sampling_params, k, options.batch_size, shown.show)
        counts.append(count)
        for (c, ids), answer in zip(asked, answers, strict=True):
            if not answer:
                leave_out(c, turn, BROKEN_REASON)
                continue
            documents.append(Document.of(c.id, ids, answer, options.temperature))
            said[c.id].append(lm.tokenizer.decode(answer, ids if options.raw else ()))
    return PassCounts.total(counts), documents, left_out


def _print_counts(name: str, found: Found) -> None:
    print(name, *(f"  {line}" for line in omissions.summary(found.left_out)), sep="\n")
    for kind, counts in found.counts.items():
        for count in counts:
            shares = " ".join(f"{x:.3f}" for x in count.acceptance)
            print(
                f"  {kind:8} k={count.draft_length} kappa {count.kappa:.3f}  accepted by position {shares}"
                f"  ({count.answers} answers)"
            )
    if found.forecasts.right:
        print(f"  {found.forecasts.line()}")


def _write_report(found: dict[str, Found], options: argparse.Namespace) -> None:
    report: dict[str, Any] = {"target": options.target, "draft": options.draft, "temperature": options.temperature}
    if Path(options.draft).is_dir():
        report["weights"] = head_checkpoint.read_config(options.draft).get("weights")  # says which head it was
    report["files"] = {
        name: {kind: [count.report() for count in counts] for kind, counts in one.counts.items()}
        for name, one in found.items()
    }
    report["by_confidence"] = {name: one.forecasts.report() for name, one in found.items() if one.forecasts.right}
    report["left_out"] = {name: omissions.counts(one.left_out) for name, one in found.items()}
    try:
        files.write_whole(options.json, json.dumps(files.seal(report), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"the report cannot be written to {options.json}: {error}") from error
