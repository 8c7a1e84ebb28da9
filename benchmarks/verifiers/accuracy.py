"""What each verification brings in speed, and what a lossy one costs in right answers: GSM8K.

    python -m benchmarks.verifiers.accuracy --problems test.jsonl --first 320 --json FILE

The problems are rows {"question", "answer"} as GSM8K has them, whose answer ends with "#### 72". An answer is right if
the last number in it is that one. All take turns over the same batches; the head alone drafts, without lookup. Where
answers are greedy, verification by blocks is the exact one and takes no part.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import contestants, report
from benchmarks.harness.console import show
from benchmarks.verifiers import heads
from specformer_jax.batch import generation
from specformer_jax.cli import command_line
from specformer_jax.config import SamplingParams
from specformer_jax.decoding.verification.kind import BLOCK, EXACT, FLY
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    heads.add_arguments(parser, temperatures=[0.0, 0.8], max_new_tokens=256)
    parser.add_argument("--problems", required=True, metavar="FILE.jsonl")
    parser.add_argument("--first", type=int, default=320, help="how many of them")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args(arguments)
    return command_line.run_command(lambda: print_report(options))


def print_report(options: argparse.Namespace) -> None:
    """Answers the problems in every way, and shows the table."""
    lm = heads.load_head(options)
    problems = read_problems(options.problems)[: options.first]
    if not 1 <= options.batch_size <= len(problems):
        raise UserError(f"--batch-size {options.batch_size} is not within 1 and the {len(problems)} problems")
    encoded = [generation.encode_prompt(lm, [question], raw=False) for question, _ in problems]
    wanted = [number for _, number in problems]
    rows = []
    for temperature in options.temperatures:
        sampling_params = SamplingParams(temperature=temperature, max_new_tokens=options.max_new_tokens)
        rows += compare(lm, encoded, wanted, sampling_params, k=options.draft_length, batch_size=options.batch_size)
    found = {
        "target": lm.name,
        "dtype": options.dtype,
        "draft_length": options.draft_length,
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "ways": rows,
    }
    show(found, markdown(found), options.json)


def read_problems(path: str) -> list[tuple[str, str]]:
    """Each question and the number that is its answer.

    Raises:
      UserError: the file cannot be read, or a row is no problem of GSM8K.
    """
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        return [(row["question"], last_number(row["answer"].split("####")[1])) for row in rows]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has no problems of GSM8K: {error!r}") from error


def last_number(text: str) -> str:
    """The last number that a text names, without commas and an idle fraction; "" where there is none.

    >>> last_number("So she makes $1,080.00 a day."), last_number("nothing")
    ('1080', '')
    """
    found = _NUMBER.findall(text)
    return re.sub(r"\.0+$", "", found[-1].replace(",", "")) if found else ""


def compare(
    lm: LanguageModel,
    encoded: Sequence[Sequence[int]],
    wanted: Sequence[str],
    sampling_params: SamplingParams,
    *,
    k: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """A row for each way to decode.

    Args:
      lm: the model with its head.
      encoded: the questions as token ids; those that fill no batch are left out.
      wanted: the number that answers each.
      sampling_params: how they are answered.
      k: how many drafts a row has.
      batch_size: how many rows are decoded together.
    """
    batches = [encoded[i : i + batch_size] for i in range(0, len(encoded) - batch_size + 1, batch_size)]

    def taking_part(name: str, verification: str, k: int) -> contestants.Contestant:
        tokens = sampling_params.max_new_tokens
        longest = [len(prompt) for prompt in encoded]
        shape = generation.job_shape(longest, tokens, batch_size=batch_size, window=k + 1, context=lm.config.context)
        return contestants.ours(heads.judged(lm, verification), name, k, sampling_params, shape)

    names = (EXACT, BLOCK, FLY) if sampling_params.temperature else (EXACT, FLY)
    ways = [taking_part("plain", EXACT, 0), *(taking_part(name, name, k) for name in names)]
    runs = contestants.interleave(ways, batches, f"k = {k}")
    numbers = {
        name: [last_number(lm.tokenizer.decode(answer)) for run in some for answer in run.answers]
        for name, some in runs.items()
    }
    rows = []
    for way in ways:
        entry = report.entry(way, batch_size, runs[way.name], runs["plain"], {})
        said = numbers[way.name]
        right = sum(a == b for a, b in zip(said, wanted, strict=False))
        same = sum(a == b for a, b in zip(said, numbers["plain"], strict=True))
        kept = {name: entry[name] for name in ("kappa", "speedup", "answers", "answers_that_part_from_plain")}
        row = {"temperature": sampling_params.temperature, "verification": way.name, "right": right}
        rows.append(row | {"same_number_as_plain": same} | kept)
    return rows


def markdown(found: dict[str, Any]) -> str:
    """The table."""
    parts = [
        f"{found['target']}, {found['dtype']}, the head alone, k = {found['draft_length']}, batch"
        f" {found['batch_size']}, {found['ways'][0]['answers']} problems of GSM8K, at most {found['max_new_tokens']}"
        " new tokens each:",
        "",
        "| temperature | verification | right | with plain's number | other than plain's | kappa | speed-up |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way in found["ways"]:
        parts.append(
            f"| {way['temperature']} | {way['verification']} | {way['right']} | {way['same_number_as_plain']} "
            f"| {way['answers_that_part_from_plain']} | {way['kappa']:.2f} | **{way['speedup']:.2f}x** |"
        )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
