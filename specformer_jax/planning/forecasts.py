"""What a head forecast along answers that are known, and what kappa its confidence makes of a draft budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from specformer_jax.decoding.state import BINS, DOUBT, FARTHEST
from specformer_jax.planning.calibration import Calibration

BUDGETS = (1, 2)  # mean drafts a row and pass that kappa is told for
THRESHOLDS = 48  # of survival that are tried to find them
PARTS = 10  # by their size, in which forecasts are compared with what came true


@dataclasses.dataclass(frozen=True)
class Forecasts:
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

    @classmethod
    def together(cls, parts: Sequence[Forecasts]) -> Forecasts:
        """Those of all answers, in the order of the parts."""
        return cls([r for part in parts for r in part.right], [c for part in parts for c in part.confidence])

    def line(self) -> str:
        """For people."""
        budgets = ", ".join(f"{kappa:.3f} at {budget} a row" for budget, kappa in self.kappa_by_budget().items())
        errors = " ".join(f"{error:.3f}" for error in self.calibration_error())
        return f"drafts by confidence: kappa {budgets}; its calibration error by slot {errors}"

    def report(self) -> dict[str, Any]:
        """JSON of it."""
        return {
            "kappa_by_budget": {str(budget): round(kappa, 4) for budget, kappa in self.kappa_by_budget().items()},
            "calibration_error": [round(error, 4) for error in self.calibration_error()],
        }

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

    def kappa_by_budget(self) -> dict[int, float]:
        """kappa where drafts are placed by their survival, so many a pass in the mean; all J where there are fewer.

        A pass reads those drafts of its chain whose survival is above a threshold, the same everywhere: what a batch of
        many rows under one budget does. Thresholds between which the budget lies are interpolated.
        """
        calibration = Calibration(self.slots, BINS)
        calibration.observe(self.outcomes())
        survival = [survival_along(calibration, *answer) for answer in zip(self.right, self.confidence, strict=True)]
        everything = np.concatenate([chances.reshape(-1) for chances in survival])
        tried = [np.inf, *np.quantile(everything, np.linspace(1, 0, THRESHOLDS)), -np.inf]
        points = [self._spend([(chances >= least).sum(axis=1) for chances in survival]) for least in tried]
        drafts, kappa = (np.maximum.accumulate(values) for values in zip(*points, strict=True))
        return {budget: float(np.interp(budget, drafts, kappa)) for budget in BUDGETS}

    def calibration_error(self) -> list[float]:
        """How far survival is from what comes true, slot by slot: the expected calibration error.

        As in decoding, the calibration learns answer by answer; the later half of them is judged, each by what those
        before it taught and by its own record so far. Forecasts of a slot are compared in ten parts of their range,
        weighed by how many are there.
        """
        calibration, forecast, came = Calibration(self.slots, BINS), [], []
        for number, (right, confidence) in enumerate(zip(self.right, self.confidence, strict=True)):
            if number >= len(self.right) // 2:
                forecast.append(survival_along(calibration, right, confidence))
                came.append(right[:, None] > np.arange(self.slots))
            calibration.observe(Forecasts([right], [confidence]).outcomes())
        return [_error(*slot) for slot in zip(np.concatenate(forecast).T, np.concatenate(came).T, strict=True)]

    def _spend(self, caps: Sequence[np.ndarray]) -> tuple[float, float]:
        """Drafts a pass and kappa where each place reads so many drafts."""
        tokens = passes = drafts = 0
        for right, cap in zip(self.right, caps, strict=True):
            at, committed = 0, np.minimum(right, cap) + 1
            while at < len(right):
                drafts, passes = drafts + int(cap[at]), passes + 1
                at += int(committed[at])
            tokens += len(right)
        return drafts / passes, tokens / passes


def survival_along(calibration: Calibration, right: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """The survival of the drafts at each place of an answer, f[places, J], as its passes of all J drafts teach it.

    Args:
      calibration: what confidence is worth, of all rows.
      right, confidence: one answer's, see `Forecasts`.
    """
    promised = 1 / (1 + np.exp(-calibration.log_odds(confidence)))
    offsets = np.zeros((len(right), 1))
    surplus = evidence = 0.0
    at = 0
    while at < len(right):
        tried = promised[at, : right[at] + 1]
        surplus += min(right[at], len(tried)) - tried.sum()
        evidence += (tried * (1 - tried)).sum()
        following = at + int(right[at]) + 1
        offsets[at + 1 : following + 1] = np.clip(surplus / (evidence + DOUBT), -FARTHEST, FARTHEST)
        at = following
    return calibration.survival(confidence, offsets)


def _error(forecast: np.ndarray, came: np.ndarray) -> float:
    part = np.minimum((forecast * PARTS).astype(int), PARTS - 1)
    return float(np.abs(np.bincount(part, forecast - came)).sum() / len(came))
