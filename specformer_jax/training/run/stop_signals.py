"""SIGTERM and SIGINT of a training command: the first one ends it in order, the second one at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopAsked(BaseException):
    """The command was told to stop where nothing is unsaved; no `Exception`, so that nothing takes it for a failure."""


class StopSignals:
    """What the signals of a command have asked for; `listening` makes one.

    Attributes:
      received: the signal that asked for the end, or None.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._finishes_step = False

    @contextlib.contextmanager
    def after_a_step(self) -> Iterator[None]:
        """Within it the first signal waits for the loop to ask `asked` and to save; elsewhere it ends the command."""
        self._finishes_step = True
        try:
            yield
        finally:
            self._finishes_step = False

    def asked(self, done: int) -> bool:
        """Whether the run shall stop after this many steps, all hosts after the same one."""
        if jax.process_count() > 1:
            # `jax.distributed` hears SIGTERM itself: a signal to any host lets all agree on a step none has passed.
            if multihost_utils.reached_preemption_sync_point(done):
                self.received = self.received or signal.SIGTERM
                return True
            return False
        return self.received is not None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            print(f"{name} again: ended at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        elif self._finishes_step:
            print(f"{name}: saving a checkpoint; a second signal ends at once", file=sys.stderr, flush=True)
            self.received = signal.Signals(number)
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)  # for `jax.distributed` to hear
        else:
            self.received = signal.Signals(number)
            raise StopAsked


@contextlib.contextmanager
def listening() -> Iterator[StopSignals]:
    """Listens until its end, in the main thread; elsewhere somebody else handles signals."""
    stop = StopSignals()
    before = {}
    # Joined processes leave SIGTERM to `jax.distributed`, which has a handler of its own for it.
    numbers = [signal.SIGINT] if jax.distributed.is_initialized() else [signal.SIGINT, signal.SIGTERM]
    with contextlib.suppress(ValueError):
        for number in numbers:
            before[number] = signal.signal(number, stop._hear)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
