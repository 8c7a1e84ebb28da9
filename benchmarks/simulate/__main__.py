"""What a budget of draft tokens shared by confidence would bring on chips that are not here: a simulation.

    python -m benchmarks.simulate record --prompts prompts.jsonl          writes benchmarks/results/recording.json
    python -m benchmarks.simulate [--json FILE] [--plot FILE.svg]         replays it

`record` lets the built-in target answer prompts and notes, at every place of an answer, how sure the head is of each
slot and how many of its drafts are right: whatever a policy drafts there, the recording says what comes of it. The
replay decodes these answers in B rows that are always full, on a roofline of a chip's data sheet: a step takes the time
of reading weights and cache at 90 % of the bandwidth or of its arithmetic at 70 % of the peak, whichever is longer. The
policies are plain decoding, every fixed k, and the budget that promises most, as `planning.planner` chooses it, on what
confidence was worth in the other half of the recording and in the answer so far. Nothing of this was measured on such
a chip.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.aot.step import QWEN3_8B
from benchmarks.harness.console import show
from benchmarks.simulate.recording import Recording
from benchmarks.simulate.replay import Roofline, replay
from benchmarks.simulate.report import markdown, plot
from specformer_jax.cli import command_line
from specformer_jax.config import DraftConfig
from specformer_jax.decoding.state import BINS
from specformer_jax.planning.calibration import Calibration
from specformer_jax.planning.chips import CHIPS

RECORDING = Path(__file__).parent.parent / "results" / "recording.json"
SETUPS = (("H100", 1), ("A100", 1), ("v6e", 8))  # a chip, and over how many of them the target is split


def simulate(recording: Recording, batches: Sequence[int], contexts: Sequence[int]) -> dict[str, Any]:
    """Every policy on every chip, context and batch."""
    learned, asked = recording.halves()
    calibration = Calibration(recording.slots, BINS)
    calibration.observe(learned.outcomes())
    entries = []
    for name, chips in SETUPS:
        cost = Roofline(CHIPS[name], chips, QWEN3_8B, DraftConfig(recording.slots).bind(QWEN3_8B))
        for context in contexts:
            for rows in batches:
                found = {
                    k: replay(asked, calibration, cost, rows, context, k) for k in (*range(recording.slots + 1), None)
                }
                off = found[0]["tokens_per_second"]
                best = max(range(recording.slots + 1), key=lambda k: found[k]["tokens_per_second"])
                ragged = found[None]
                entries.append(
                    {
                        "chip": name, "chips": chips, "context": context, "rows": rows, "best_fixed_k": best,
                        "fixed_k4": round(found[recording.slots]["tokens_per_second"] / off, 3),
                        "best_fixed": round(found[best]["tokens_per_second"] / off, 3),
                        "ragged": round(ragged["tokens_per_second"] / off, 3),
                        "ragged_kappa": round(ragged["kappa"], 3),
                        "ragged_drafts": round(ragged["drafts_per_row"], 3),
                    }
                )  # fmt: skip
    return {"target": "Qwen3-8B", "answers": len(recording.right), "slots": recording.slots, "entries": entries}


def record(options: argparse.Namespace) -> None:
    """Answers prompts, and notes what the head says at every place of the answers."""
    from benchmarks.serving import read_prompts
    from specformer_jax.batch import generation
    from specformer_jax.config import SamplingParams
    from specformer_jax.loading.language_model import load
    from specformer_jax.training.evaluate import forecast_everywhere

    command_line.keep_compiled_programs()
    lm = load(lookup=False)
    encoded = read_prompts(lm, options.prompts, options.count)
    sampling_params = SamplingParams(max_new_tokens=options.max_new_tokens)
    answers = []
    for i, answer in generation.generate_ids(lm, encoded, sampling_params, draft_length=0):
        if answer.completion_tokens < 2:
            continue
        right, confidence = forecast_everywhere(lm, encoded[i], answer.token_ids)
        answers.append({"right": right.tolist(), "confidence_percent": np.round(confidence * 100).astype(int).tolist()})
    RECORDING.write_text(json.dumps({"target": lm.name, "answers": answers}) + "\n")
    print(f"{len(answers)} answers, {sum(len(a['right']) for a in answers)} places: {RECORDING}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", nargs="?", choices=("record", "replay"), default="replay")
    parser.add_argument("--prompts", action="append", metavar="FILE", help="of `record`; the built-in ones without")
    parser.add_argument("--count", type=int, default=48, help="prompts of `record`")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of `record`")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.verb == "record":
        record(options)
        return
    found = simulate(Recording.load(RECORDING), options.rows, options.contexts)
    show(found, markdown(found), options.json)
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
