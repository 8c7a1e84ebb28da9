"""Where the time of a run goes: to batches, the target, the head, checkpoints, counts along held-out answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax

STEP_PARTS = ("data", "target", "head")  # what a step takes; the others come between steps


class StepTimes:
    """Seconds of the steps since the last line, without what compiling took.

    The device works at one step while the host makes the next batch. So "data" is what the host waited for or did about
    batches, and the rest of a step is split by what the target's pass took when it was timed alone.
    """

    def __init__(self, clock: Callable[[], float]):
        """
        Args:
          clock: seconds, standing still while programs are compiled.
        """
        self._clock, self._line_begun = clock, clock()
        self._spent: dict[str, float] = {}
        self._target: float | None = None

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """What is done within it counts as this part."""
        begun = self._clock()
        try:
            yield
        finally:
            self._spent[part] = self._spent.get(part, 0.0) + self._clock() - begun

    def time_target(self, read: Callable[[], jax.Array], passes: int) -> None:
        """Times the target's pass alone, once.

        Args:
          read: begins one.
          passes: how many of them a step has; a step over stored hooks has none.
        """
        if self._target is not None:
            return
        begun = self._clock()
        jax.block_until_ready(read())
        once = self._clock() - begun
        self._target = passes * once
        self._line_begun += once  # no part of any step

    def take(self, steps: int) -> dict[str, float]:
        """The seconds of each part since the last call, in which there were so many steps."""
        now = self._clock()
        spent, self._spent = self._spent, {}
        rest = max(now - self._line_begun - sum(spent.values()), 0.0)
        self._line_begun = now
        target = min((self._target or 0.0) * steps, rest)
        parts = {"data": spent.pop("data", 0.0), "target": target, "head": rest - target} | spent
        return {name: round(seconds, 4) for name, seconds in parts.items()}
