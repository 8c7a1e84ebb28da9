"""`serve.py generate`: prompts from the command line or a file, answers to the terminal or a file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from specformer_jax.batch import compile_clock, generation, prompt_files, row_files
from specformer_jax.batch.conversations import Conversation
from specformer_jax.batch.generation import Answer
from specformer_jax.batch.row_batch import Rows
from specformer_jax.cli import command_line, dialogues, http
from specformer_jax.config import SamplingParams, Shape
from specformer_jax.decoding.pass_counts import PassCounts
from specformer_jax.decoding.verification.kind import EXACT, FLY, NAMES, PROMISES, Verification
from specformer_jax.engine import answer_file
from specformer_jax.engine.request import Request
from specformer_jax.errors import UserError, require
from specformer_jax.loading.language_model import LanguageModel, load
from specformer_jax.nn.mesh import on_mesh

LEAST_TIMED = 0.05  # seconds of decoding that a rate can be told from
AnswerIds = Callable[..., Iterator[tuple[int, Answer]]]  # `generate_ids` with all but prompts and `on_rows`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve.py generate`."""
    command_line.add_model_arguments(parser)
    command_line.add_mesh_argument(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a user message; may be repeated")
    source.add_argument("--prompts", metavar="SOURCE", help=dialogues.SOURCE)
    dialogues.add_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0 is off")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 is off")
    parser.add_argument("--min-p", type=float, default=0.0, help="0 is off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--draft-length", default="auto", metavar="auto|0..J", help="drafts a step; auto measures for more than one row"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="rows decoded together")
    parser.add_argument(
        "--strict",
        type=int,
        metavar="POSITIONS",
        help="fix every compiled shape, with so many POSITIONS a row: bfloat16 answers are then bitwise the same at"
        " every draft length and batch fill",
    )
    parser.add_argument(
        "--verification",
        default=EXACT,
        choices=NAMES,
        help="; ".join(f"{name}: {promise}" for name, promise in PROMISES.items()),
    )
    parser.add_argument("--fly-window", type=int, help=f"of {FLY}: right drafts behind a wrong one; 6 by default")
    parser.add_argument("--fly-entropy", type=float, help=f"of {FLY}: of the target, in nats; 0.3 by default")
    command_line.add_grammar_arguments(parser)
    parser.add_argument("--output", metavar="FILE.jsonl", help="write the answers there, a line each as they finish")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue an output file that a stopped run left, and ask again what failed",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, no summary")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the verb; user mistakes raise `UserError`."""
    sampling_params = SamplingParams(
        options.temperature, options.top_k, options.top_p, options.min_p, options.seed, options.max_new_tokens
    )
    draft_length = _parse_draft_length(options.draft_length)
    require(
        (options.batch_size >= 1, f"batch-size {options.batch_size} must be at least 1"),
        (not options.resume or bool(options.output), "--resume continues an output file: name it with --output"),
    )
    grammar = command_line.grammar_of(options)
    require((grammar is None or options.strict is None, "--strict has no shape for grammars: leave out one of both"))
    verification = _verification(options)
    if grammar is not None:
        verification.require_exact("an answer with a grammar")
    if options.strict is not None:
        verification.require_exact("--strict")
    dialogues.check(options)
    conversations = _conversations(options)
    command_line.keep_compiled_programs()
    compiled = compile_clock.CompileClock()
    # The file is checked before the model is loaded: a mistake there should not cost a minute.
    output = None
    if options.output:
        made_with = {"target": options.target, "dtype": options.dtype, "raw": options.raw, "grammar": grammar}
        made_with |= dataclasses.asdict(sampling_params) | {"verification": verification.name}
        made_with |= {"fly_window": verification.fly_window, "fly_entropy": verification.fly_entropy}
        output = prompt_files.AnswerFile(
            options.output, prompt_files.asked_turns(conversations), made_with, resume=options.resume
        )
    made_by = _batches if grammar is None else functools.partial(_engine, grammar)
    with prompt_files.kept_if_written(output), made_by(options, sampling_params, draft_length) as (lm, answer_ids):
        begin = time.perf_counter()
        if output is None and len(conversations) == 1 and len(conversations[0].turns) == 1:
            answers = [_stream(lm, conversations[0], options.raw, answer_ids)]
        else:
            answers = _answer_all(lm, conversations, output, options, answer_ids)
    if not options.quiet:
        print(_summary(answers, time.perf_counter() - begin, compiled.seconds), file=sys.stderr)
        if any(answer.verification != EXACT for answer in answers):
            print(f"verified by {options.verification}: {verification.promise}", file=sys.stderr)
    # Rows that could not be run are reported in the output; where none could, that is a mistake of this call.
    if len(answers) == sum(len(c.turns) for c in conversations) and all(answer.error for answer in answers):
        raise UserError(f"no prompt could be answered: {answers[0].error}" if answers[1:] else answers[0].error)
    return 0


@contextlib.contextmanager
def _batches(
    options: argparse.Namespace, sampling_params: SamplingParams, draft_length: int | None
) -> Iterator[tuple[LanguageModel, AnswerIds]]:
    """The model, and compiled jobs that answer by it."""
    mesh = command_line.mesh_of(options)
    lm = load(
        options.target,
        draft=options.draft,
        lookup=options.lookup,
        dtype=options.dtype,
        mesh=mesh,
        verification=_verification(options),
    )
    generation.check_draft_length(lm, draft_length)
    shape = _strict_shape(lm, options)
    if options.draft == "auto" and lm.model.drafter is None and not options.quiet:
        print(f"no draft head is shipped for {options.target}: decoding plainly", file=sys.stderr)
    if not options.quiet:
        print("compiling the programs for this shape; the next start finds them in the cache", file=sys.stderr)
    with on_mesh(mesh):
        yield (
            lm,
            functools.partial(
                generation.generate_ids,
                lm,
                sampling_params=sampling_params,
                draft_length=draft_length,
                batch_size=options.batch_size,
                shape=shape,
                raw=options.raw,
            ),
        )


@contextlib.contextmanager
def _engine(
    grammar: str, options: argparse.Namespace, sampling_params: SamplingParams, draft_length: int | None
) -> Iterator[tuple[LanguageModel, AnswerIds]]:
    """The same with an engine, which has its answers follow a grammar."""
    with http.start(options, http.stored_programs(rows=options.batch_size, max_context=None)) as engine:
        generation.check_draft_length(engine.lm, draft_length)
        speculative = "auto" if draft_length is None else draft_length
        request = Request((0,), sampling_params, speculative, grammar=grammar, raw=options.raw, streams=False)
        engine.learn(grammar)
        yield engine.lm, functools.partial(answer_file.answer_each, engine, request)


def _verification(options: argparse.Namespace) -> Verification:
    """How drafts are verified."""
    own = {"fly_window": options.fly_window, "fly_entropy": options.fly_entropy}
    given = {name: value for name, value in own.items() if value is not None}
    require((not given or options.verification == FLY, f"--fly-window and --fly-entropy need --verification {FLY}"))
    return Verification(options.verification, **given)


def _parse_draft_length(text: str) -> int | None:
    """The k that `--draft-length` names; None is the automatic choice."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UserError(f"draft-length {text!r} must be auto or a number of drafts from 0 on")
    return int(text)


def _conversations(options: argparse.Namespace) -> list[Conversation]:
    """The prompts of the file, or of the command line."""
    if options.prompts is not None:
        return prompt_files.read_prompts(options.prompts, options.system)
    if not all(options.prompt):
        raise UserError("a prompt is empty: give --prompt some text")
    row_files.check_unicode("--prompt", *options.prompt)
    return [Conversation(str(i), (prompt,), options.system) for i, prompt in enumerate(options.prompt)]


def _strict_shape(lm: LanguageModel, options: argparse.Namespace) -> Shape | None:
    """The shape that `--strict` fixes; None where it is not given."""
    if options.strict is None:
        return None
    if not 64 <= options.strict <= lm.config.context:
        raise UserError(f"--strict takes 64 to {lm.config.context} positions for this target, not {options.strict}")
    window = lm.model.max_draft_length + 1
    return Shape(rows=options.batch_size, window=window, chunk=64, positions=options.strict)


def _stream(lm: LanguageModel, c: Conversation, raw: bool, answer_ids: AnswerIds) -> Answer:
    """One prompt, its answer printed as it is made."""
    ids = generation.encode_prompt(lm, c.turns, raw, c.system)
    stream, shown = lm.tokenizer.stream(ids if raw else ()), 0

    def show(indices: Sequence[int], rows: Rows) -> None:
        nonlocal shown
        tokens = rows.answer(0)
        print(stream.push(tokens[shown:]), end="", flush=True)
        shown = len(tokens)

    [(_, answer)] = answer_ids([ids], on_rows=show)
    if not answer.error:
        print(stream.push(answer.token_ids[shown:]) + stream.finish(), flush=True)
    return answer


def _answer_all(
    lm: LanguageModel,
    conversations: list[Conversation],
    output: prompt_files.AnswerFile | None,
    options: argparse.Namespace,
    answer_ids: AnswerIds,
) -> list[Answer]:
    """Every turn of every conversation, in rounds; each answer is written as soon as its batch is done."""
    from tqdm import tqdm

    texts = {} if output is None else {key: row["text"] for key, row in output.done.items()}
    answers = []
    total = sum(len(c.turns) for c in conversations)
    with tqdm(total=total, unit="answer", disable=options.quiet, file=sys.stderr) as progress:

        def show(indices: Sequence[int], rows: Rows) -> None:
            progress.set_postfix_str(f"{(rows.known - rows.prompt).sum()} tokens in this batch")

        for turn, asked in prompt_files.rounds(conversations):
            progress.update(sum((c.id, turn) in texts for c in asked))
            asked = [c for c in asked if (c.id, turn) not in texts]
            prompts, reasons = [], {}
            for i, c in enumerate(asked):
                try:
                    before = generation.answers_before(c, turn, texts)
                    prompts.append(generation.encode_turn(lm, c, before, options.raw))
                except UserError as error:  # the row's own mistake: the others go on
                    prompts.append([])
                    reasons[i] = str(error)
            for i, answer in answer_ids(prompts, on_rows=show):
                if i in reasons:
                    answer = Answer.failed(reasons[i])
                if answer.error is None:
                    texts[asked[i].id, turn] = answer.text
                row = generation.answer_row(asked[i], turn, answer)
                if output is not None:
                    output.write(row)
                else:
                    tqdm.write(json.dumps(row, ensure_ascii=False), file=sys.stdout)
                answers.append(answer)
                progress.update(1)
    return answers


def _summary(answers: list[Answer], seconds: float, compile_seconds: float) -> str:
    """What a run took, in lines for people."""
    ended = [a for a in answers if not a.error]
    tokens, decoding = sum(a.completion_tokens for a in answers), max(seconds - compile_seconds, 1e-9)
    timed = f"{tokens} tokens in {decoding:.1f} s: {tokens / decoding:.1f} tokens/s"
    if decoding < LEAST_TIMED or not tokens:
        timed = f"{tokens} tokens, too few to be timed"
    lines = [f"{timed}, and {compile_seconds:.1f} s to compile"]
    if any(a.steps for a in ended):
        passes = PassCounts.total([a.passes for a in ended])
        drafts = " or ".join(map(str, sorted({a.passes.draft_length for a in ended})))
        lines.append(f"kappa {passes.kappa:.2f} (tokens a target pass), {passes.steps} passes, drafts a pass: {drafts}")
        if passes.draft_length:
            shares = " ".join(f"{share:.0%}" for share in passes.acceptance)
            lines.append(f"drafts accepted by position: {shares}")
    if failed := len(answers) - len(ended):
        lines.append(f'{failed} prompts could not be answered: see "error" in their rows')
    return "\n".join(lines)
