"""What a budget of draft tokens shared by confidence would bring on chips that are not here: a simulation.

    python -m benchmarks.simulate record --prompts prompts.jsonl          writes benchmarks/results/recording.json
    python -m benchmarks.simulate [--json FILE] [--plot FILE.svg]         replays it

`record` lets the built-in target answer prompts and notes, at every place of an answer, how sure the head is of each
slot and how many of its drafts are right: whatever a policy drafts there, the recording says what comes of it. The
replay decodes these answers in B rows that are always full, on a roofline of a chip's data sheet: a step takes the time
of reading weights and cache at 90 % of the bandwidth or of its arithmetic at 70 % of the peak, whichever is longer. The
policies are plain decoding, every fixed k, and the budget that promises most, as `planning.planner` chooses it, on what
confidence was worth in the other half of the recording. Nothing of this was measured on such a chip.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.aot.step import QWEN3_8B
from benchmarks.harness.chips import CHIPS, Chip
from specformer_jax.cli import command_line
from specformer_jax.config import DraftConfig, TargetConfig
from specformer_jax.decoding.state import BINS
from specformer_jax.errors import UserError
from specformer_jax.planning.calibration import Calibration
from specformer_jax.planning.planner import best_drafts

RECORDING = Path(__file__).parent / "results" / "recording.json"
BANDWIDTH, ARITHMETIC = 0.9, 0.7  # shares of the data sheet that well-made programs reach
STEPS, WARM_UP = 400, 50  # of a replay, and how many of them are not counted
SETUPS = (("H100", 1), ("A100", 1), ("v6e", 8))  # a chip, and over how many of them the target is split


@dataclasses.dataclass(frozen=True)
class Recording:
    """Answers of the target, each place of them with what the head forecast there.

    Attributes:
      right: how many drafts were right before the first wrong one, place after place, one array an answer.
      confidence: how sure the head was of each slot, f[places, J], one array an answer.
    """

    right: Sequence[np.ndarray]
    confidence: Sequence[np.ndarray]

    @property
    def slots(self) -> int:
        """J."""
        return self.confidence[0].shape[1]

    def halves(self) -> tuple[Recording, Recording]:
        """Every other answer, and the rest."""
        return tuple(Recording(self.right[i::2], self.confidence[i::2]) for i in range(2))

    def outcomes(self) -> np.ndarray:
        """What `Calibration.observe` learns from: i[J, BINS, 2]."""
        found = np.zeros((self.slots, BINS, 2), np.int64)
        for right, confidence in zip(self.right, self.confidence, strict=True):
            bins = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
            for j in range(self.slots):
                reached = right >= j
                np.add.at(found[j, :, 0], bins[reached, j], 1)
                np.add.at(found[j, :, 1], bins[right > j, j], 1)
        return found

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Reads what `record` wrote."""
        try:
            stored = json.loads(path.read_text())
            answers = stored["answers"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is no recording ({error}): make one with `record`") from error
        return cls([np.array(a["right"]) for a in answers], [np.array(a["confidence_percent"]) / 100 for a in answers])


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What a step of a target costs on some chips.

    Attributes:
      chip: one of them.
      chips: how many of them share the target, as if communication were free.
      target: the sizes of the target, in bfloat16.
      draft: those of its head.
    """

    chip: Chip
    chips: int
    target: TargetConfig
    draft: DraftConfig

    @property
    def weights(self) -> int:
        """Parameters that a step multiplies with: the layers, and the LM head once."""
        t = self.target
        layer = t.width * t.head_size * (2 * t.heads + 2 * t.kv_heads) + 3 * t.width * t.ffn
        return t.layers * layer + t.vocab_size * t.width

    @property
    def head(self) -> int:
        """Parameters of the draft head, with the LM head's columns that it drafts over."""
        t, d = self.target, self.draft
        attention = t.width * t.head_size * (2 * t.heads + 2 * t.kv_heads)
        slots = (4 + d.max_draft_length) * t.width**2
        return slots + 2 * attention + 3 * t.width * t.ffn + (d.draft_vocab_size or t.vocab_size) * t.width

    def seconds(self, tokens: int, rows: int, positions: int, drafts: bool) -> float:
        """The seconds of a step.

        Args:
          tokens: T, how many it reads.
          rows: how many rows they belong to.
          positions: how many positions of the cache all rows together have.
          drafts: whether the head proposes drafts for the next step.
        """
        t = self.target
        cache = 2 * 2 * t.kv_heads * t.head_size * (t.layers + 1) * positions
        scores = 4 * t.heads * t.head_size * (t.layers + 1) * positions * tokens / rows
        flops = 2 * self.weights * tokens + scores
        read = 2 * self.weights + cache
        if drafts:
            flops += 2 * self.head * rows
            read += 2 * self.head
        return max(flops / (ARITHMETIC * self.chip.peak), read / (BANDWIDTH * self.chip.bandwidth)) / self.chips


def replay(
    recording: Recording, calibration: Calibration, cost: Roofline, rows: int, context: int, policy: int | None
) -> dict[str, float]:
    """Decodes the recording's answers in rows that are always full.

    Args:
      recording: the answers.
      calibration: what confidence is worth.
      cost: what a step costs.
      rows: B.
      context: how many positions each row has beside its answer.
      policy: k, the same for every row; None shares out the budget that promises most.

    Returns:
      Tokens a second, kappa, and drafts a row and step.
    """
    rng = np.random.default_rng(0)
    answer = rng.integers(len(recording.right), size=rows)
    place = np.array([rng.integers(len(recording.right[i])) for i in answer])
    J, tokens, seconds, drafted = recording.slots, 0, 0.0, 0
    survivals = [calibration.survival(confidence) for confidence in recording.confidence]
    for step in range(STEPS):
        positions = int(rows * context + place.sum())
        right = np.array([recording.right[i][p] for i, p in zip(answer, place, strict=True)])
        if policy is None:
            survival = np.array([survivals[i][p] for i, p in zip(answer, place, strict=True)])
            gains = best_drafts(survival, np.full(rows, J))
            promised = np.concatenate([[0.0], np.cumsum(gains)])
            sizes = np.unique(np.linspace(0, len(gains), 8 * J + 1).astype(int))
            rates = [(rows + promised[n]) / cost.seconds(rows + n, rows, positions, drafts=n > 0) for n in sizes]
            budget = int(sizes[int(np.argmax(rates))])
            least = gains[budget - 1] if budget else np.inf
            drafts = np.minimum((survival >= least).sum(axis=1), J)
        else:
            drafts = np.full(rows, policy)
        committed = np.minimum(right, drafts) + 1
        if step >= WARM_UP:
            seconds += cost.seconds(int(rows + drafts.sum()), rows, positions, drafts=bool(drafts.any()))
            tokens, drafted = tokens + int(committed.sum()), drafted + int(drafts.sum())
        place += committed
        for row in np.nonzero(place >= [len(recording.right[i]) for i in answer])[0]:
            answer[row], place[row] = rng.integers(len(recording.right)), 0
    passes = rows * (STEPS - WARM_UP)
    return {
        "tokens_per_second": tokens / seconds, "kappa": tokens / passes, "drafts_per_row": drafted / passes
    }  # fmt: skip


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


def markdown(found: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"Simulation: {found['target']} in bfloat16 on data sheets, acceptances and confidences of {found['answers']}"
        " recorded answers of the built-in target; speed over plain decoding.",
        "",
        f"| chips | context | rows | k = {found['slots']} | best fixed k | by confidence | drafts a row | kappa |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for e in found["entries"]:
        chips = e["chip"] if e["chips"] == 1 else f"{e['chips']} x {e['chip']}"
        lines.append(
            f"| {chips} | {e['context']:,} | {e['rows']} | {e['fixed_k4']:.2f}x |"
            f" {e['best_fixed']:.2f}x (k = {e['best_fixed_k']}) | {e['ragged']:.2f}x | {e['ragged_drafts']:.2f} |"
            f" {e['ragged_kappa']:.2f} |"
        )
    return "\n".join(lines) + "\n"


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


def plot(found: dict[str, Any], path: Path) -> None:
    """Speed over plain decoding by batch, a panel for each chip and context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(e["chip"], e["context"]) for e in found["entries"]})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4), layout="constrained", sharey=True)
    for (chip, context), ax in zip(panels, np.atleast_1d(axes), strict=True):
        entries = [e for e in found["entries"] if (e["chip"], e["context"]) == (chip, context)]
        rows = [e["rows"] for e in entries]
        for key, name in (
            ("fixed_k4", f"k = {found['slots']}"),
            ("best_fixed", "best fixed k"),
            ("ragged", "by confidence"),
        ):
            ax.plot(rows, [e[key] for e in entries], "o-", label=name)
        ax.axhline(1, color="grey", linewidth=0.8)
        ax.set(xscale="log", xlabel="rows", title=f"{chip}, context {context:,}")
        ax.set_xticks(rows, labels=[str(n) for n in rows])
    np.atleast_1d(axes)[0].set_ylabel("speed over plain decoding, simulated")
    np.atleast_1d(axes)[0].legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", nargs="?", choices=("record", "replay"), default="replay")
    parser.add_argument("--prompts", action="append", metavar="FILE", help="of `record`; the built-in ones without")
    parser.add_argument("--count", type=int, default=48, help="prompts of `record`")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of `record`")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256, 512])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.verb == "record":
        record(options)
        return
    found = simulate(Recording.load(RECORDING), options.rows, options.contexts)
    print(markdown(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
