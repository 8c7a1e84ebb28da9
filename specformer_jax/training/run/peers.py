"""The other processes of a run: where one of them dies or fails, the rest end within half a minute and say which.

Each process leaves a sign of life every second where all of them look (the key-value store of `jax.distributed`, which
the first one holds). A device's collectives would otherwise wait for minutes for who has gone, or for ever.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

EVERY, DEAD = 1.0, 20.0  # seconds between signs of life; without one for so long a process is taken for dead
HEARD = 5.0  # seconds in which the others read that this one failed
LINGER = 3.0  # seconds that the first one stays when another failed: with it goes what they all talk through
FAILED, LOST = 2, 3  # the exit codes of a mistake, and of a process that ends because of another one
_TELLTALES = ("Gloo", "UNAVAILABLE", "coordination", "barrier", "heartbeat", "DEADLINE")


class Peers:
    """What this process knows of the others; `watch` begins to look."""

    def __init__(self, client: Any, index: int, count: int):
        """
        Args:
          client: of `jax.distributed`, or anything with its methods on keys and values.
          index: which process this is.
          count: how many there are.
        """
        self._client, self.index, self._others = client, index, [i for i in range(count) if i != index]
        self.name = f"process {index} of {count} on {socket.gethostname()}"
        self._names = {i: f"process {i} of {count}" for i in self._others}
        self._seen: dict[int, tuple[str, float]] = {}
        self._failed = threading.Event()

    def watch(self) -> None:
        """Looks at the others from now on, beside all else that this process does."""
        self._set("name", self.name)
        if self._others:
            end_on_abort(self._who_has_gone)
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def fail(self, sentence: str) -> None:
        """Tells the others that this process fails, and waits for a moment until they know."""
        self._failed.set()
        self._set("failed", sentence)
        deadline = time.monotonic() + HEARD
        while time.monotonic() < deadline and not set(self._others) <= self._entries("heard").keys():
            time.sleep(0.1)

    @property
    def failed(self) -> bool:
        """Whether this process has told the others that it fails: nobody waits for it at its end."""
        return self._failed.is_set()

    def leave(self) -> None:
        """This process has done its part: its silence means nothing from now on."""
        self._set("done", "")

    def await_verdict(self, error: BaseException) -> None:
        """Waits where an error may come of a process that has gone, until that is found out, which ends this one."""
        told = f"{error} {error.__cause__}"
        if any(word in told for word in _TELLTALES):
            time.sleep(DEAD + 3 * EVERY)

    def meet(self, place: str, patience: float) -> None:
        """Waits until all processes are at this place, so many seconds at most."""
        self._client.wait_at_barrier(f"specformer/{place}", int(1000 * patience))

    def _set(self, kind: str, value: str) -> None:
        try:
            self._client.key_value_set(f"specformer/{kind}/{self.index}", value, allow_overwrite=True)
        except Exception:  # whoever holds the store has gone: the watch says so
            return

    def _entries(self, kind: str) -> dict[int, str]:
        try:
            found = self._client.key_value_dir_get(f"specformer/{kind}/")
        except Exception:
            return {}
        return {int(key.rsplit("/", 1)[1]): value for key, value in found}

    def _watch(self) -> None:
        beats = 0
        while True:
            beats += 1
            self._set("alive", str(beats))
            self.look(time.monotonic())
            time.sleep(EVERY)

    def look(self, now: float) -> None:
        """Ends this process if another has failed, or has been silent for too long at this time."""
        self._names |= {i: name for i, name in self._entries("name").items() if i in self._names}
        for i, sentence in self._entries("failed").items():
            if i in self._names:
                self._set("heard", "")
                if self.index == 0:
                    time.sleep(LINGER)
                self._end(f"{self._names[i]} failed: {sentence}")
        alive, done = self._entries("alive"), self._entries("done")
        for i in self._others:
            beat, since = self._seen.get(i, ("", now))
            if alive.get(i, beat) != beat:
                beat, since = alive[i], now
            self._seen[i] = beat, since
            if i not in done and now - since > DEAD:
                self._end(f"{self._names[i]} has gone: nothing was heard of it for {DEAD:.0f} seconds")

    def _end(self, sentence: str) -> None:
        if not self._failed.is_set():
            _exit(f"error: {sentence}; this one ends, the same command on all of them goes on")

    def _who_has_gone(self) -> str | None:
        if self.failed:
            return None
        if self.index:
            return f"{self._names[0]} has gone, which holds all together; this one ends, the same command goes on"
        others = " or ".join(self._names[i] for i in self._others)
        return f"{others} has gone; this one ends, the same command on all of them goes on"


_LIBC = ctypes.CDLL(None)
_LIBC.signal.argtypes, _LIBC.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
_handlers: list[Any] = []  # kept: C would call what Python has freed


def end_on_abort(sentence: Callable[[], str | None]) -> Callable[[], None]:
    """JAX and its collectives abort a process whose others have gone: from now on it says so and ends with `LOST`.

    Args:
      sentence: what it says; None where it has said itself that it fails, and ends with `FAILED`.

    Returns:
      What makes an abort again what it was before.
    """

    def aborted(_: int) -> None:
        said = sentence()
        if said is None:
            os._exit(FAILED)
        _exit(f"error: {said}")

    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted))
    before = _LIBC.signal(signal.SIGABRT, ctypes.cast(_handlers[-1], ctypes.c_void_p))
    return lambda: _LIBC.signal(signal.SIGABRT, before)


def _exit(sentence: str) -> NoReturn:
    """Ends the process from any thread: the main one may be waiting in a collective that never ends."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{sentence}\n".encode())
    os._exit(LOST)
