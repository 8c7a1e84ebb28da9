"""A run is seen while it trains: plain lines under a pipe, and no time to compile in its rate."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from specformer_jax.training.report import progress
from specformer_jax.training.train_step import StepMetrics

METRICS = StepMetrics(jnp.float32(1.5), np.ones(2), np.ones(2), jnp.float32(2), jnp.float32(0.25), jnp.float32(8))


def test_plain_lines_where_there_is_no_terminal(capsys):
    shown = progress.Progress(4, 10, enabled=True)
    for step in (5, 6):
        shown.step(step, METRICS)
    shown.show(6, METRICS, 123.4, 5e-4)
    shown.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 5 is done after ") and first.endswith(" s of them to compile")
    assert second == "step 6 of 10: loss 1.500 kappa 2.000 123 tokens/s rate 5.00e-04 gradient 2.50e-01"


def test_nothing_is_shown_where_it_is_not_wanted(capsys):
    shown = progress.Progress(0, 10, enabled=False)
    shown.step(1, METRICS)
    shown.show(1, METRICS, 1.0, 1.0)
    shown.close()
    assert capsys.readouterr() == ("", "")


def test_the_clock_stands_still_while_something_is_compiled(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    shown = progress.Progress(0, 1, enabled=False)
    begun = shown.seconds()
    now[0] = 7.0
    shown._compiled._listen("/jax/core/compile/backend_compile_duration", 5.0)
    assert shown.seconds() - begun == 2.0
