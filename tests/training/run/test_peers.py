"""A process that loses another one ends within half a minute, and says whom."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from specformer_jax.cli.training import distributed
from specformer_jax.errors import UserError
from specformer_jax.training.run import peers
from specformer_jax.training.run.peers import DEAD, Peers
from specformer_jax.training.run.stop_signals import StopAsked


class Ended(Exception):
    """What `_exit` becomes here."""


class Store:
    """Keys and values as `jax.distributed` keeps them."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


@pytest.fixture
def two(monkeypatch):
    def end(sentence):
        raise Ended(sentence)

    monkeypatch.setattr(peers, "_exit", end)
    store = Store()
    both = [Peers(store, i, 2) for i in range(2)]
    for one in both:
        one._set("name", one.name)
    return both


def test_silence_is_death_unless_its_part_is_done(two):
    first, second = two
    for now in (0.0, 10.0, 20.0):
        second._set("alive", str(now))
        first.look(now)
    first.look(20 + DEAD)
    with pytest.raises(Ended, match=r"process 1 of 2 on \S+ has gone: nothing was heard of it for 20 seconds"):
        first.look(21 + DEAD)
    second.leave()
    first.look(100 + DEAD)


def test_a_process_that_never_gave_a_sign_is_missed_too(two):
    two[0].look(0.0)
    with pytest.raises(Ended, match="process 1 of 2 on .* has gone"):
        two[0].look(DEAD + 1)


def test_a_failure_is_told_and_heard(two, monkeypatch):
    first, second = two
    monkeypatch.setattr(peers, "HEARD", 0.2)
    monkeypatch.setattr(peers, "LINGER", 0.0)
    second.fail("shard-1.jsonl, line 3: no ids")
    with pytest.raises(Ended, match=r"process 1 of 2 on \S+ failed: shard-1.jsonl, line 3: no ids; this one ends"):
        first.look(1.0)
    assert first._entries("heard") == {0: ""} and second.failed and not first.failed
    first._failed.set()  # both have failed: each says its own sentence
    first.look(2.0)


def test_a_store_that_has_gone_is_no_failure_of_its_own(two):
    two[0]._client = None
    two[0].leave()
    assert two[0]._entries("alive") == {}


def test_an_error_of_the_connection_waits_for_the_verdict_and_no_other_does(two, monkeypatch):
    slept = []
    monkeypatch.setattr(peers.time, "sleep", slept.append)
    two[0].await_verdict(UserError("the file is damaged"))
    assert not slept
    two[0].await_verdict(ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"))
    assert slept and slept[0] > DEAD


def test_a_verb_that_fails_in_one_process_says_in_which(two, monkeypatch):
    first = two[0]
    monkeypatch.setattr(peers, "HEARD", 0.0)
    monkeypatch.setattr(distributed, "_joined", [first])

    def failing(error):
        def command():
            raise error

        return command

    with pytest.raises(UserError, match=r"process 0 of 2 on \S+: the data is bad"):
        distributed.together(failing(UserError("the data is bad")))
    assert first._entries("failed") == {0: "the data is bad"}
    with pytest.raises(StopAsked):
        distributed.together(failing(StopAsked("after step 3")))  # all stop there
    assert first._entries("failed") == {0: "the data is bad"} and first._entries("done") == {0: ""}
    with pytest.raises(StopAsked):
        distributed.together(failing(StopAsked()))
    assert first._entries("failed") == {0: "it was told to stop"}
    ended = []
    monkeypatch.setattr(distributed.os, "_exit", ended.append)
    distributed.end(2)
    assert ended == [2]


@pytest.mark.parametrize(
    "leaving, code", [("d.end(7)", 7), ("os.abort()", 3), ("again(); os.abort()", -signal.SIGABRT)]
)
def test_an_abort_is_a_sentence_and_none_when_all_is_done(leaving, code):
    """What C runs at the end of a process may abort, when Python has gone that would say something."""
    lines = (
        "import ctypes, os",
        "from specformer_jax.cli.training import distributed as d",
        "from specformer_jax.training.run import peers",
        "d._joined.append(peers.Peers(None, 1, 2))",
        "again = peers.end_on_abort(lambda: 'process 0 has gone')",
        "libc = ctypes.CDLL(None)",
        "libc.__cxa_atexit.argtypes = [ctypes.c_void_p] * 3",
        "libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)",
        leaving,
    )
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=300)
    assert found.returncode == code, found.stderr
    assert ("error: process 0 has gone" in found.stderr) == (code == 3)


def test_one_process_has_nobody_to_tell(monkeypatch):
    monkeypatch.setattr(distributed, "_joined", [])
    assert distributed.together(lambda: 7) == 7
    distributed.meet("anywhere", 1)
    distributed.end(2)
