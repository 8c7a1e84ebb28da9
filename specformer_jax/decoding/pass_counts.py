"""What decoding took, said once: kappa, and how often the draft at each position was committed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass
class PassCounts:
    """What decoding a set of answers with k drafts a step took.

    Attributes:
      draft_length: k.
      tokens: committed by decode passes.
      steps: decode passes of the target.
      accepted: i64[k], how often the draft at each position was committed.
      answers: how many.
    """

    draft_length: int
    tokens: int = 0
    steps: int = 0
    accepted: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    answers: int = 0

    def __post_init__(self):
        if not len(self.accepted):
            self.accepted = np.zeros(self.draft_length, np.int64)

    @property
    def kappa(self) -> float:
        """Mean tokens committed per target pass; 1, as in plain decoding, where no pass was needed."""
        return self.tokens / self.steps if self.steps else 1.0

    @property
    def acceptance(self) -> list[float]:
        """Share of the passes that committed the draft at each position."""
        return (self.accepted / max(self.steps, 1)).tolist()

    def add(self, tokens: int, steps: int, accepted: Sequence[int] | np.ndarray) -> None:
        """Counts one more answer; its drafts may have been fewer than k."""
        self.tokens += tokens
        self.steps += steps
        self.accepted[: len(accepted)] += np.asarray(accepted[: self.draft_length], np.int64)
        self.answers += 1

    @classmethod
    def of(cls, completion_tokens: int, steps: int, accepted: Sequence[int]) -> PassCounts:
        """The counts of one answer, whose first token comes from reading the prompt."""
        counts = cls(len(accepted))
        counts.add(max(completion_tokens - 1, 0), steps, accepted)
        return counts

    @classmethod
    def total(cls, counts: Sequence[PassCounts]) -> PassCounts:
        """Several counts as one, at the largest k among them."""
        summed = cls(max(count.draft_length for count in counts))
        for count in counts:
            summed.add(count.tokens, count.steps, count.accepted)
        return dataclasses.replace(summed, answers=sum(count.answers for count in counts))

    def report(self) -> dict[str, Any]:
        """JSON of it."""
        return {
            "draft_length": self.draft_length,
            "kappa": round(self.kappa, 4),
            "acceptance": [round(x, 4) for x in self.acceptance],
            "tokens": self.tokens,
            "steps": self.steps,
            "answers": self.answers,
        }
