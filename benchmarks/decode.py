"""Speculative decoding against plain decoding and against transformers, in one interleaved run.

    python -m benchmarks.decode --batch-sizes 1,4,16 --draft-lengths 0,2,4,auto --baselines hf,hf-lookup

At each batch size every contestant answers the same prompts, side by side, with other prompts each round. All
are warmed up first, so nothing compiles inside a timing. Times cover the whole call, prompts included; what is
compared are the ratios of runs that stand side by side, and their median. Beside it stands the throughput over all
rounds together, tokens by seconds, where answers that gain much count for more. `0` is plain decoding with no head
loaded, `auto` what `--draft-length auto` drafts, `head alone` the largest k without prompt lookup. Answers that part
from plain decoding's are counted: on a CPU with native bodies, with `--strict` and with `--dtype float32` there must be
none; elsewhere a step of another size is another program and can flip a near tie.

`hf` is transformers' greedy `generate` in the same dtype, `hf-lookup` the same with its prompt-lookup drafts (batch 1).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import contestants, machine, prompts, report
from benchmarks.harness.console import add_answer_arguments, numbers, say, show
from benchmarks.harness.contestants import Contestant
from specformer_jax.batch import auto_draft_length, generation
from specformer_jax.cli import command_line
from specformer_jax.config import SamplingParams, Shape
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel, load

BASELINES = ("hf", "hf-lookup")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_model_arguments(parser)
    parser.add_argument("--batch-sizes", default="1,4,16", metavar="B,B,...")
    parser.add_argument("--draft-lengths", default="0,2,4,auto", metavar="K,K,...|auto")
    parser.add_argument("--baselines", default="", metavar=",".join(BASELINES))
    parser.add_argument("--prompts", default="builtin", metavar="builtin|FILE.jsonl")
    parser.add_argument("--rounds", type=int, help="at each batch size; default: 5, and at least 32 prompts")
    parser.add_argument("--strict", action="store_true", help="one compiled shape a batch size for all draft lengths")
    add_answer_arguments(parser, temperature="above 0 the baselines are left out")
    parser.add_argument("--plot", metavar="FILE|DIR", help="draw the figures there (extra `bench`)")
    options = parser.parse_args(arguments)
    return command_line.run_command(lambda: print_report(options))


def print_report(options: argparse.Namespace) -> None:
    """Runs the benchmark and shows it."""
    found = run(options)
    show(found, report.markdown(found), options.json)
    if options.plot:
        from benchmarks.harness import plots

        for file in plots.plot(found, options.plot):
            say(f"drew {file}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark, as `--json` writes it.

    Raises:
      UserError: options that do not fit together, or what `language_model.load` raises.
    """
    sizes = numbers("--batch-sizes", options.batch_sizes, least=1)
    sampling_params = SamplingParams(temperature=options.temperature, max_new_tokens=options.max_new_tokens)
    command_line.keep_compiled_programs()
    lm = load(options.target, draft=options.draft, lookup=options.lookup, dtype=options.dtype)
    lengths = draft_lengths(lm, options.draft_lengths)
    encoded = prompts.encode(lm, options.prompts)
    baselines = load_baselines(options)

    entries = measure(
        lm, encoded, sampling_params, sizes, lengths, rounds=options.rounds, strict=options.strict, baselines=baselines
    )
    return {
        "target": lm.name,
        "draft": Path(lm.draft_name).name if lm.draft_name else lm.model.drafter and lm.model.drafter.config.drafter,
        "dtype": options.dtype,
        "temperature": options.temperature,
        "max_new_tokens": options.max_new_tokens,
        "strict": options.strict,
        "prompts": Path(options.prompts).name,
        "machine": machine.measure(options.dtype),
        "entries": entries,
    }


def measure(
    lm: LanguageModel,
    encoded: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    batch_sizes: Sequence[int],
    lengths: Sequence[int | None],
    *,
    rounds: int | None,
    strict: bool,
    baselines: dict[str, tuple[Any, int | None]],
) -> list[dict[str, Any]]:
    """Every contestant at every batch size: the entries of the report.

    Args:
      encoded: the prompts as token ids; a round takes the next ones, and begins again where they end.
      lengths: of `draft_lengths`, plain decoding first.
      baselines: of `load_baselines`.
    """
    entries = []
    for size in batch_sizes:
        count = rounds or max(5, -(-32 // size))
        batches = [[encoded[(i * size + row) % len(encoded)] for row in range(size)] for i in range(count)]
        taking_part = ours(lm, lengths, sampling_params, batches, strict)
        taking_part += [
            contestants.transformers(model, name, lm.config.eos_ids, sampling_params.max_new_tokens, lookup)
            for name, (model, lookup) in baselines.items()
            if size == 1 or lookup is None
        ]
        runs = contestants.interleave(taking_part, batches, f"batch {size}")
        against = {name: runs[name] for name in baselines if name in runs}
        entries += [report.entry(c, size, runs[c.name], runs["plain"], against) for c in taking_part]
    return entries


def draft_lengths(lm: LanguageModel, text: str) -> list[int | None]:
    """The draft lengths asked for that the head has, plain decoding first; None is auto."""
    asked = [part for part in text.split(",") if part]
    found: list[int | None] = [0]
    for k in numbers("--draft-lengths", ",".join(part for part in asked if part != "auto"), least=0):
        if k > lm.model.max_draft_length:
            say(f"k = {k} is left out: the draft head has {lm.model.max_draft_length} slots")
        elif k:
            found.append(k)
    return found + [None] * ("auto" in asked)


def ours(
    lm: LanguageModel,
    lengths: Sequence[int | None],
    sampling_params: SamplingParams,
    batches: Sequence[Sequence[Sequence[int]]],
    strict: bool,
) -> list[Contestant]:
    """This project at each draft length, and at the largest without lookup, in the shape that holds every batch."""
    size = len(batches[0])
    prompt_lengths = [len(prompt) for batch in batches for prompt in batch]
    widest = max(lm.model.max_draft_length if k is None else k for k in lengths) + 1
    lm = lm.sampling_with(sampling_params)  # so that `auto` times the very steps that decode

    def shape_of(k: int) -> Shape:
        window = widest if strict else k + 1
        return generation.job_shape(
            prompt_lengths, sampling_params.max_new_tokens, batch_size=size, window=window, context=lm.config.context
        )

    found = []
    for asked in lengths:
        name = "plain" if asked == 0 else "auto" if asked is None else f"k = {asked}"
        k = auto_draft_length.choose(lm, shape_of, sampling_params) if asked is None else asked
        found.append(contestants.ours(lm, name, k, sampling_params, shape_of(k)))
    alone, longest = lm.without_lookup(), max(k for k in lengths if k is not None)
    if alone is not lm and longest:
        found.append(contestants.ours(alone, f"k = {longest}, head alone", longest, sampling_params, shape_of(longest)))
    return found


def load_baselines(options: argparse.Namespace) -> dict[str, tuple[Any, int | None]]:
    """Name -> (transformers' model, drafts of prompt lookup or None); what cannot take part is said and left out."""
    names = [name for name in options.baselines.split(",") if name]
    if unknown := [name for name in names if name not in BASELINES]:
        raise UserError(f"--baselines {unknown[0]!r} is none of {', '.join(BASELINES)}")
    if not names:
        return {}
    if options.temperature > 0:
        say("the baselines are left out: they decode greedily, and --temperature is above 0")
        return {}
    try:
        model = contestants.load_transformers(options.target, options.dtype)
    except ImportError:
        say("the baselines are left out: torch and transformers are not installed")
        return {}
    return {name: (model, contestants.LOOKUP_TOKENS if name == "hf-lookup" else None) for name in names}


if __name__ == "__main__":
    sys.exit(main())
