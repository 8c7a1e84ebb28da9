"""How long compiling took, to tell it from the work itself."""

from __future__ import annotations

import time

import jax

from specformer_jax.batch import auto_draft_length


class CompileClock:
    """Counts the time spent tracing, compiling and timing steps (`auto`) since it was made."""

    def __init__(self):
        self._spans: list[tuple[float, float]] = []  # apart from each other, in order
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    @property
    def seconds(self) -> float:
        """How many seconds it was; programs that are traced within others count once."""
        return sum(end - begin for begin, end in self._spans)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/") or event == auto_draft_length.MEASURING:
            end = time.perf_counter()
            begin = end - duration_secs
            while self._spans and self._spans[-1][0] >= begin:
                self._spans.pop()
            if self._spans:
                begin = max(begin, self._spans[-1][1])
            self._spans.append((begin, end))
