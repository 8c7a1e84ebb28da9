"""Answers with what the head forecast at every place: whatever a policy drafts there, they say what it brings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from specformer_jax.decoding.state import BINS
from specformer_jax.errors import UserError


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
