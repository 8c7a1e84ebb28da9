"""What a drafter's confidence is worth, slot by slot, learned from what was accepted.

The chance that a draft is right, once all before it were, is sigmoid(slope * logit(confidence) + offset). Outcomes are
counted in bins of confidence, older ones weighing less, and the line is fitted to them as a logistic regression.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int

MEMORY = 4000.0  # outcomes of a slot after which an earlier one counts for 1/e
PRIOR = 30.0  # outcomes that the beginning counts for
ROUNDS = 4  # of Newton's method; it starts from the line before
HALVINGS = 8  # of one of its steps, which goes too far where the line before is far off


class Calibration:
    """Slope and offset of each slot.

    Attributes:
      line: f32[J, 2], slope and offset.
    """

    line: Float32[np.ndarray, "J 2"]

    def __init__(self, slots: int, bins: int):
        """
        Args:
          slots: J.
          bins: in how many bins of confidence outcomes are counted.
        """
        middle = (np.arange(bins) + 0.5) / bins
        self._logit = np.log(middle / (1 - middle))
        self._counts = np.zeros((slots, bins, 2))
        self.line = np.tile(np.array([1, 0], np.float32), (slots, 1))
        # Before anything is seen: as many outcomes as count, spread over the bins, right as often as they claim.
        self._prior = np.stack([np.ones(bins), middle], axis=-1) * PRIOR / bins

    def observe(self, outcomes: Int[np.ndarray, "J BINS 2"]) -> None:
        """Learns from a call: how many drafts were read in each bin, and how many of them were right."""
        seen = outcomes[:, :, 0].sum(axis=1)
        if not seen.any():
            return
        self._counts *= np.exp(-seen / MEMORY)[:, None, None]
        self._counts += outcomes
        for slot in np.nonzero(seen)[0]:
            self.line[slot] = self._fit(self._counts[slot] + self._prior, self.line[slot])

    def _fit(self, counts: np.ndarray, line: np.ndarray) -> np.ndarray:
        tried, right = counts.T

        def surprise(at: np.ndarray) -> float:
            z = at[0] * self._logit + at[1]
            return (tried * np.logaddexp(0, z) - right * z).sum()

        line = line.astype(float)
        for _ in range(ROUNDS):
            slope, offset = line
            p = 1 / (1 + np.exp(-(slope * self._logit + offset)))
            error, weight = right - tried * p, tried * p * (1 - p) + 1e-9
            # The normal equations of two unknowns.
            a, b, c = (weight * self._logit**2).sum(), (weight * self._logit).sum(), weight.sum()
            x, y = (error * self._logit).sum(), error.sum()
            turned = float(np.clip(slope + (c * x - b * y) / (a * c - b * b), 0.05, 5))
            # The best offset for the slope that there will be, also where that was clipped.
            moved = float(np.clip(offset + (y - b * (turned - slope)) / c, -6, 6))
            step = np.array([turned - slope, moved - offset])
            nearer = (line + step / 2**halved for halved in range(HALVINGS))
            line = next((found for found in nearer if surprise(found) <= surprise(line)), line)
        return line.astype(np.float32)

    def log_odds(self, confidence: np.ndarray) -> np.ndarray:
        """Of each draft being right once all before it were: f[..., J] of confidence f[..., J]."""
        clipped = np.clip(confidence, 1e-4, 1 - 1e-4)
        return self.line[:, 0] * np.log(clipped / (1 - clipped)) + self.line[:, 1]

    def survival(self, confidence: np.ndarray, row_offset: np.ndarray | float = 0.0) -> np.ndarray:
        """The chance that each draft and all before it are right: f[..., J] of confidence f[..., J].

        `row_offset` is what a row's own record adds to the log odds; see `DecodeState`.
        """
        return np.cumprod(1 / (1 + np.exp(-(self.log_odds(confidence) + row_offset))), axis=-1)
