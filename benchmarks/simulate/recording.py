"""Answers with what the head forecast at every place: whatever a policy drafts there, they say what it brings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from specformer_jax.errors import UserError
from specformer_jax.planning.forecasts import Forecasts


class Recording(Forecasts):
    """Forecasts that a file keeps."""

    def halves(self) -> tuple[Recording, Recording]:
        """Every other answer, and the rest."""
        return tuple(Recording(self.right[i::2], self.confidence[i::2]) for i in range(2))

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Reads what `record` wrote."""
        try:
            stored = json.loads(path.read_text())
            answers = stored["answers"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is no recording ({error}): make one with `record`") from error
        return cls([np.array(a["right"]) for a in answers], [np.array(a["confidence_percent"]) / 100 for a in answers])
