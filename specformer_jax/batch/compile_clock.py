"""How long compiling took, to tell it from the work itself."""

from __future__ import annotations

import jax

from specformer_jax.batch import auto_draft_length


class CompileClock:
    """Seconds spent tracing, compiling and timing steps (`auto`) since it was made."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/") or event == auto_draft_length.MEASURING:
            self.seconds += duration_secs
