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


def test_answers_are_seen_from_their_first_tokens_on(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    shown = progress.AnswerProgress("p.jsonl", 8)
    said = [capsys.readouterr().err]
    for seconds, answers, tokens in ((1, 0, 0), (2, 0, 8), (3, 1, 30), (12, 2, 120), (13, 8, 260)):
        now[0] = float(seconds)
        shown.show(answers, tokens)
        said.append(capsys.readouterr().err)
    shown.close()
    said.append(capsys.readouterr().err)
    assert said == [
        "p.jsonl: 0 of 8 answers\n",
        "",
        "p.jsonl: the first tokens after 2.0 s, 0.0 s of them to compile\n",
        "",
        "p.jsonl: 2 of 8 answers, 120 tokens, 10 tokens/s\n",
        "",
        "p.jsonl: 8 of 8 answers, 260 tokens, 20 tokens/s\n",
    ]


def test_what_took_no_time_has_no_rate_and_what_was_not_shown_no_line(capsys, monkeypatch):
    monkeypatch.setattr(progress.time, "perf_counter", lambda: 0.0)
    shown = progress.AnswerProgress("p.jsonl", 1)
    shown.show(1, 4)
    shown.close()
    assert capsys.readouterr().err.splitlines()[2] == "p.jsonl: 1 of 1 answers, 4 tokens"
    progress.AnswerProgress("p.jsonl", 0).close()
    quiet = progress.AnswerProgress("p.jsonl", 1, enabled=False)
    quiet.show(1, 4)
    quiet.close()
    assert capsys.readouterr().err == ""
