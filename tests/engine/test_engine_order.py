"""Which request the engine serves next, and in what calls: priorities, a full queue, steps of a call, budgets."""

import dataclasses
import threading
import time

import pytest

from specformer_jax.config import SamplingParams
from specformer_jax.decoding.state import BINS
from specformer_jax.engine import Engine
from specformer_jax.engine import engine as engine_module
from specformer_jax.engine.request import QueueFull, Request
from specformer_jax.planning.budgets import CALL_SECONDS
from specformer_jax.planning.calibration import Calibration
from specformer_jax.planning.cost_table import CostTable
from specformer_jax.planning.planner import FixedDrafts, Planner
from tests.engine import tiny_lm
from tests.engine.tiny_engine import CONFIG, ENDLESS, KINDS, PROMPTS, expected, held, ids, wait_idle


def test_priorities_and_order(engine):
    order: list[str] = []
    with held(engine) as first:
        handles = []
        for name, priority in (("late", 1), ("a", 0), ("b", 0), ("first", -1)):
            handle = engine.submit(Request(PROMPTS[0], KINDS[3], priority=priority))
            handle.subscribe(lambda delta, name=name: order.append(name) if delta.tokens else None)
            handles.append(handle)
    first.cancel()
    wait_idle(engine)
    assert order == ["first", "a", "b", "late"]


def test_no_priority_waits_for_ever(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "AGING", 0.05)
    ended = threading.Event()
    with held(engine):
        last = engine.submit(Request(PROMPTS[0], KINDS[0], priority=1))
        last.subscribe(lambda delta: ended.set() if delta.finish_reason else None)
        others = [engine.submit(ENDLESS) for _ in range(8)]
    sent = 0
    while not ended.is_set():  # somebody more important is always waiting
        if engine.stats().queued < 4:
            others.append(engine.submit(ENDLESS))
            sent += 1
            assert sent < 2000
        time.sleep(0.001)
    for handle in others:
        handle.cancel()
    wait_idle(engine)


def test_a_full_queue_says_when_to_try_again(engine):
    with held(engine):
        time.sleep(0.01)
        handles = [engine.submit(ENDLESS) for _ in range(CONFIG.max_queue)]
        with pytest.raises(QueueFull) as full:
            for _ in range(3):
                handles.append(engine.submit(ENDLESS))
        assert 1 <= full.value.retry_after <= 60
        for handle in handles:
            handle.cancel()
    assert {list(handle)[-1].finish_reason for handle in handles} == {"cancelled"}
    wait_idle(engine)


def test_rows_fill_at_once_and_are_looked_at_after_every_step_while_others_wait(engine, monkeypatch):
    calls: list[tuple[int, int, int]] = []
    advance = engine.compiled_steps.advance

    def note(state, control, steps, budget):
        calls.append((steps, len(engine._scheduler.in_flight), engine.stats().queued))
        return advance(state, control, steps, budget)

    monkeypatch.setattr(engine.compiled_steps, "advance", note)
    with held(engine, dataclasses.replace(ENDLESS, streams=False)) as running:
        params = SamplingParams(max_new_tokens=12)
        others = [engine.submit(Request((4 + i,), params, streams=False)) for i in range(6)]
    for handle in (*others, running):
        list(handle)
    # The first call was planned before the others came.
    assert calls[1][1] == CONFIG.rows
    assert {steps for steps, _, queued in calls[1:] if queued} == {1}
    assert CONFIG.steps_per_call in {steps for steps, _, queued in calls[1:] if not queued}
    wait_idle(engine)


def test_steps_that_take_long_make_calls_of_few(lm):
    """Who reads along sees a steady stream: a call takes `CALL_SECONDS` at most where a step takes less."""
    costs = CostTable(dict.fromkeys(CONFIG.budgets, CALL_SECONDS / 2.5), 0.0, "test")
    with Engine(lm, CONFIG, Planner(costs, Calibration(tiny_lm.DRAFTS, BINS), tiny_lm.DRAFTS)) as engine:
        called, advance = [], engine.compiled_steps.advance
        engine.compiled_steps.advance = lambda *arguments: (called.append(arguments[2]), advance(*arguments))[1]
        assert ids(engine.submit(ENDLESS)) == expected(ENDLESS.prompt_ids, ENDLESS.sampling_params)
        assert max(called) == 2
        engine.planner.costs = dataclasses.replace(costs, seconds=dict.fromkeys(CONFIG.budgets, 1.0))
        called.clear()
        list(engine.submit(ENDLESS))
        assert set(called) == {1}


def test_a_single_budget_is_called_for_everything(lm):
    strict = dataclasses.replace(CONFIG, budgets=(20,))
    with Engine(lm, strict) as engine:
        assert isinstance(engine.planner, FixedDrafts) and len(engine.compiled_steps.budgets) == 1
        called, advance = set(), engine.compiled_steps.advance
        engine.compiled_steps.advance = lambda *arguments: (called.add(arguments[3]), advance(*arguments))[1]
        handles = [(p, k, engine.submit(Request(p, k))) for p in PROMPTS for k in KINDS[:2]]
        assert all(ids(handle) == expected(prompt, kind) for prompt, kind, handle in handles)
        assert {budget.size for budget in called} == {20}
        assert engine.stats().accepted_tokens > 0
