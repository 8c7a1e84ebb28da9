"""kappa by the way drafts are verified: exactly, by blocks, by blocks of several chains, and by FLy, which is lossy.

    python -m benchmarks.verifiers --prompts gsm8k.jsonl humaneval.jsonl --each 8 --json FILE

The head alone drafts, without lookup. All verifications have the same prompts, draft length and temperatures; their
answers are not the same. With n chains a pass reads n times as many tokens for a row: they are n copies of the row,
each with drafts of its own, of which one goes on as all of them. What that costs is not measured here: kappa counts
tokens a pass, whatever is read in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import prompts
from benchmarks.harness.console import numbers, say, show
from benchmarks.verifiers import copies, heads
from benchmarks.verifiers.report import markdown
from specformer_jax.batch import generation
from specformer_jax.cli import command_line
from specformer_jax.config import SamplingParams
from specformer_jax.decoding.pass_counts import PassCounts
from specformer_jax.decoding.verification.kind import BLOCK, EXACT, FLY
from specformer_jax.loading.language_model import LanguageModel

KEEPS = {EXACT: "the answers", BLOCK: "their distribution", FLY: "neither: LOSSY"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    heads.add_arguments(parser, temperatures=[0.8, 1.0], max_new_tokens=96)
    parser.add_argument("--prompts", nargs="+", default=["builtin"], metavar="builtin|FILE.jsonl")
    parser.add_argument("--each", type=int, default=8, help="prompts of each file, the first ones")
    parser.add_argument("--chains", default="2,4", metavar="N,N", help="how many chains are verified together")
    options = parser.parse_args(arguments)
    return command_line.run_command(lambda: print_report(options))


def print_report(options: argparse.Namespace) -> None:
    """Answers the prompts under every verification, and shows the table."""
    lm = heads.load_head(options)
    encoded = [prompt for source in options.prompts for prompt in prompts.encode(lm, source)[: options.each]]
    chains = numbers("--chains", options.chains, least=2)
    rows = []
    for temperature in options.temperatures:
        sampling_params = SamplingParams(temperature=temperature, max_new_tokens=options.max_new_tokens)
        rows += compare(lm, encoded, sampling_params, k=options.draft_length, chains=chains)
    found = {
        "target": lm.name,
        "dtype": options.dtype,
        "draft_length": options.draft_length,
        "prompts": len(encoded),
        "max_new_tokens": options.max_new_tokens,
        "verifiers": rows,
    }
    show(found, markdown(found), options.json)


def compare(
    lm: LanguageModel,
    encoded: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    *,
    k: int,
    chains: Sequence[int],
) -> list[dict[str, Any]]:
    """A row for each verification at one temperature.

    Args:
      lm: the model with its head.
      encoded: the prompts as token ids.
      sampling_params: how they are answered.
      k: how many drafts a chain has.
      chains: how many chains are verified together, one number a row.
    """
    rows = []

    def add(name: str, keeps: str, reads: int, counts: PassCounts) -> None:
        acceptance = [round(float(share), 4) for share in counts.acceptance]
        kappa = round(counts.kappa, 3)
        rows.append(
            {"temperature": sampling_params.temperature, "verification": name, "keeps": keeps, "reads": reads}
            | {"kappa": kappa, "acceptance": acceptance, "passes": counts.steps}
        )
        say(f"temperature {sampling_params.temperature}, {name}: kappa {kappa}")

    for name in (EXACT, BLOCK, FLY):
        answers = generation.generate_ids(heads.judged(lm, name), encoded, sampling_params, draft_length=k)
        add(name, KEEPS[name], 1 + k, PassCounts.total([answer.passes for _, answer in answers]))
    for n in chains:
        add(f"{n} chains", KEEPS[BLOCK], n * (1 + k), copies.count_passes(lm, encoded, sampling_params, k=k, n=n))
    return rows


if __name__ == "__main__":
    sys.exit(main())
