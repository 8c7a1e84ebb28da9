"""How a run is seen while it trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

import jax
from tqdm import tqdm

from specformer_jax.batch.compile_clock import CompileClock
from specformer_jax.training.train_step import StepMetrics


class Progress:
    """Shows steps as they are done, and times them without what compiling takes."""

    def __init__(self, done: int, total: int, *, enabled: bool):
        """
        Args:
          done: how many steps are done already.
          total: the step that the run ends after.
          enabled: whether anything is shown.
        """
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(initial=done, total=total, unit="step", disable=not (enabled and on_terminal))
        self._lines = enabled and not on_terminal
        self._compiled = CompileClock()
        self._first, self._begun = done + 1, time.perf_counter()

    def seconds(self) -> float:
        """A clock that stands still while programs are compiled."""
        return time.perf_counter() - self._compiled.seconds

    def step(self, done: int, metrics: StepMetrics) -> None:
        """So many steps are asked for; the first one is waited for and told, as it says that everything works."""
        self._bar.update()
        if done == self._first:
            jax.block_until_ready(metrics)
            took, compiled = time.perf_counter() - self._begun, self._compiled.seconds
            self._say(f"step {done} is done after {took:.1f} s, {compiled:.1f} s of them to compile")

    def show(self, done: int, newest: StepMetrics, rate: float, learning_rate: float) -> None:
        """What the newest step says, with anchors a second and the learning rate it was done at."""
        text = (
            f"loss {newest.loss:.3f} kappa {newest.kappa:.3f} {rate:.0f} tokens/s rate {learning_rate:.2e}"
            f" gradient {newest.gradient_norm:.2e}"
        )
        self._bar.set_postfix_str(text)
        self._say(f"step {done} of {self._bar.total}: {text}")

    def close(self) -> None:
        """The last step is done."""
        self._bar.close()

    def _say(self, line: str) -> None:
        if self._lines:
            print(line, file=sys.stderr, flush=True)
