"""How a run, or a job of answers, is seen while it works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

import jax
from tqdm import tqdm

from specformer_jax.batch.compile_clock import CompileClock
from specformer_jax.training.train_step import StepMetrics

PAUSE = 10.0  # seconds between two lines about answers
LEAST_TIMED = 0.05  # seconds that a rate can be told from


class _Shown:
    """A bar on a terminal, or else lines, and a clock that stands still while programs are compiled."""

    def __init__(self, done: int, total: int, unit: str, *, enabled: bool):
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(initial=done, total=total, unit=unit, disable=not (enabled and on_terminal))
        self._lines = enabled and not on_terminal
        self._compiled, self._begun = CompileClock(), time.perf_counter()

    def seconds(self) -> float:
        """A clock that stands still while programs are compiled."""
        return time.perf_counter() - self._compiled.seconds

    def close(self) -> None:
        """The last one is done."""
        self._bar.close()

    def _taken(self) -> str:
        return f"{time.perf_counter() - self._begun:.1f} s, {self._compiled.seconds:.1f} s of them to compile"

    def say(self, line: str) -> None:
        """A line of its own, under a bar above it."""
        if self._lines:
            print(line, file=sys.stderr, flush=True)
        elif not self._bar.disable:
            self._bar.write(line, file=sys.stderr)

    def _say(self, line: str) -> None:
        if self._lines:
            self.say(line)


class Progress(_Shown):
    """Shows steps as they are done, and times them without what compiling takes."""

    def __init__(self, done: int, total: int, *, enabled: bool):
        """
        Args:
          done: how many steps are done already.
          total: the step that the run ends after.
          enabled: whether anything is shown.
        """
        super().__init__(done, total, "step", enabled=enabled)
        self._first = done + 1

    def step(self, done: int, metrics: StepMetrics) -> None:
        """So many steps are asked for; the first one is waited for and told, as it says that everything works."""
        self._bar.update()
        if done == self._first:
            jax.block_until_ready(metrics)
            self._say(f"step {done} is done after {self._taken()}")

    def show(self, done: int, newest: StepMetrics, rate: float, learning_rate: float) -> None:
        """What the newest step says, with anchors a second and the learning rate it was done at."""
        text = (
            f"loss {newest.loss:.3f} kappa {newest.kappa:.3f} {rate:.0f} tokens/s rate {learning_rate:.2e}"
            f" gradient {newest.gradient_norm:.2e}"
        )
        self._bar.set_postfix_str(text)
        self._say(f"step {done} of {self._bar.total}: {text}")


class AnswerProgress(_Shown):
    """Shows answers as they come; there are lines at the beginning, the first tokens, every ten seconds and the end."""

    def __init__(self, what: str, total: int, *, enabled: bool = True):
        """
        Args:
          what: what asks for the answers, to begin every line with.
          total: how many answers are asked for.
          enabled: whether anything is shown.
        """
        super().__init__(0, total, "answer", enabled=enabled)
        self._bar.set_description_str(what)
        self._what, self._total, self._next = what, total, 0.0
        self._newest = self._told = ""
        if total:
            self._say(f"{what}: 0 of {total:,} answers")

    def show(self, answers: int, tokens: int, left_out: int = 0) -> None:
        """So many answers have ended, with so many tokens in them and in those that go on; to be asked often.

        Args:
          left_out: how many of the answers will not come.
        """
        self._bar.total = self._total - left_out
        seconds, now = self.seconds() - self._begun, time.perf_counter()
        rate = f", {tokens / seconds:.0f} tokens/s" if seconds >= LEAST_TIMED else ""
        self._newest = f"{answers:,} of {self._bar.total:,} answers, {tokens:,} tokens{rate}"
        self._bar.update(answers - self._bar.n)
        self._bar.set_postfix_str(f"{tokens:,} tokens{rate}")
        if tokens and not self._next:
            self._say(f"{self._what}: the first tokens after {self._taken()}")
            self._next = now + PAUSE
        elif self._next and now >= self._next:
            self._tell()
            self._next = now + PAUSE

    def close(self) -> None:
        """The last answer has ended."""
        if self._newest != self._told:
            self._tell()
        super().close()

    def _tell(self) -> None:
        self._say(f"{self._what}: {self._newest}")
        self._told = self._newest
