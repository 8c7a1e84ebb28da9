"""Recorded answers decoded on the roofline of a chip's data sheet, by plain decoding, a fixed k or a shared budget."""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.simulate.recording import Recording
from specformer_jax.config import DraftConfig, TargetConfig
from specformer_jax.planning.calibration import Calibration
from specformer_jax.planning.chips import Chip
from specformer_jax.planning.forecasts import survival_along
from specformer_jax.planning.planner import best_drafts

BANDWIDTH, ARITHMETIC = 0.9, 0.7  # shares of the data sheet that well-made programs reach
STEPS, WARM_UP = 400, 50  # of a replay, and how many of them are not counted


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What a step of a target costs on some chips.

    Attributes:
      chip: one of them.
      chips: how many of them share the target, as if communication were free.
      target: the sizes of the target, in bfloat16.
      draft: those of its head; None for a target alone.
    """

    chip: Chip
    chips: int
    target: TargetConfig
    draft: DraftConfig | None

    @property
    def weights(self) -> int:
        """Parameters that a step multiplies with: the layers, and the LM head once."""
        t = self.target
        return t.layers * (self._attention + 3 * t.width * t.ffn) + t.vocab_size * t.width

    @property
    def reader(self) -> int:
        """Parameters with which the head reads every token: downsampler and context attention; 0 without one."""
        return 0 if self.draft is None else 4 * self.target.width**2 + self._attention

    @property
    def slot(self) -> int:
        """Parameters that a draft slot is multiplied with, the LM head and a share of the positional FFN among them."""
        t, d = self.target, self.draft
        return (
            t.width**2
            + self._attention
            + 3 * t.width * (d.ffn or t.ffn)
            + (d.draft_vocab_size or t.vocab_size) * t.width
        )

    @property
    def _attention(self) -> int:
        t = self.target
        return t.width * t.head_size * (2 * t.heads + 2 * t.kv_heads)

    def work(self, tokens: int, rows: int, positions: int, drafts: bool) -> tuple[float, float]:
        """The FLOP of a step and the bytes that it reads; arguments as `seconds`."""
        t = self.target
        layers = t.layers + (self.draft is not None)
        flops = 2 * (self.weights + self.reader) * tokens
        flops += 4 * t.heads * t.head_size * layers * positions * tokens / rows
        read = 2 * (self.weights + self.reader) + 2 * 2 * t.kv_heads * t.head_size * layers * positions
        if drafts:
            J = self.draft.max_draft_length
            flops += 2 * self.slot * rows * J
            read += 2 * (self.slot + (J - 1) * t.width**2)  # the positional FFN has parameters of its own for each slot
        return flops, read

    def seconds(self, tokens: int, rows: int, positions: int, drafts: bool) -> float:
        """The seconds of a step.

        Args:
          tokens: T, how many it reads.
          rows: how many rows they belong to.
          positions: how many positions of the cache all rows together have.
          drafts: whether the head proposes drafts for the next step.
        """
        flops, read = self.work(tokens, rows, positions, drafts)
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
    survivals = [survival_along(calibration, *of) for of in zip(recording.right, recording.confidence, strict=True)]
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
