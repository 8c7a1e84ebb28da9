"""SIGTERM and SIGINT end a command in order, a second one at once; every end has its own last line and exit code."""

from __future__ import annotations

import os
import signal

import pytest

import train
from specformer_jax.cli.training import export
from specformer_jax.errors import UserError
from specformer_jax.training.run import stop_signals

BOTH = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", BOTH)
def test_outside_of_the_steps_a_signal_ends_the_command(number):
    before = [signal.getsignal(each) for each in BOTH]
    with stop_signals.listening() as stop, pytest.raises(stop_signals.StopAsked):
        signal.raise_signal(number)
    assert stop.received == number and [signal.getsignal(each) for each in BOTH] == before


@pytest.mark.parametrize("number", BOTH)
def test_within_the_steps_it_waits_for_the_step_and_a_second_one_does_not(number, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with stop_signals.listening() as stop:
        with stop.after_a_step():
            assert not stop.asked(1)
            signal.raise_signal(number)
            assert stop.asked(2) and not ended
            assert f"{number.name}: saving a checkpoint; a second signal ends at once" in capsys.readouterr().err
        signal.raise_signal(signal.SIGINT)
    assert ended == [130] and "SIGINT again: ended at once" in capsys.readouterr().err


ARGUMENTS = ["export", "--run", "runs/a", "--out", "head"]


@pytest.mark.parametrize("number", BOTH)
def test_every_end_has_its_own_last_line_and_exit_code(number, monkeypatch, capsys):
    def stopped(*arguments, **options):
        signal.raise_signal(number)

    def failed(*arguments, **options):
        raise UserError("the disk is full")

    ends = []
    for end in (lambda *arguments, **options: 5, failed, stopped):
        monkeypatch.setattr(export, "export", end)
        code = train.main(ARGUMENTS)
        ends.append((code, "".join(capsys.readouterr()).splitlines()[-1]))
    assert ends == [
        (0, "wrote the head of step 5 to head"),
        (2, "error: the disk is full"),
        (128 + number, f"stopped by {number.name} where nothing was unsaved: the same command goes on"),
    ]
