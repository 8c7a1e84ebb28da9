"""Which request the engine serves next: priorities, a full queue, long prompts, free rows."""

import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest

from specformer_jax.engine import engine as engine_module
from specformer_jax.engine.request import QueueFull, Request
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


def test_a_long_prompt_delays_others_by_one_chunk_at_most(engine, monkeypatch):
    calls: list[str] = []
    for name in ("advance", "read_chunk"):
        program = getattr(engine.compiled_steps, name)
        monkeypatch.setattr(
            engine.compiled_steps, name, lambda *a, name=name, program=program: (calls.append(name), program(*a))[1]
        )
    with held(engine) as running:
        calls.clear()
        long = engine.submit(Request(tuple(np.random.default_rng(0).integers(4, 13, 70).tolist()), KINDS[0]))
    list(long), list(running)
    first, last = calls.index("read_chunk"), len(calls) - calls[::-1].index("read_chunk")
    assert calls[first:last].count("read_chunk") == 5
    assert "read_chunk" not in [b for a, b in itertools.pairwise(calls) if a == "read_chunk"]
    wait_idle(engine)


def test_a_free_row_is_filled_before_the_others_go_on(engine, monkeypatch):
    """One step a call while a prompt waits for a row that is free, several once all are taken."""
    calls: list[tuple[int, int, int]] = []
    advance = engine.compiled_steps.advance

    def note(state, stop, steps, draft_length):
        calls.append((steps, len(engine._scheduler.running), engine.stats().queued))
        return advance(state, stop, steps, draft_length)

    monkeypatch.setattr(engine.compiled_steps, "advance", note)
    with held(engine) as running:
        others = [engine.submit(Request((4 + i,), KINDS[0])) for i in range(6)]
    for handle in (*others, running):
        list(handle)
    # The first call was planned before the others came.
    filling = [steps for steps, rows, queued in calls[1:] if rows < CONFIG.rows and queued]
    assert len(filling) >= 2 and set(filling) == {1}
    assert {steps for steps, rows, _ in calls if rows == CONFIG.rows} == {CONFIG.steps_per_call}
    wait_idle(engine)


@pytest.mark.parametrize("chunks", [1, 3])
def test_with_more_chunks_a_call_free_rows_fill_at_once(engine, monkeypatch, chunks):
    rows: list[int] = []
    advance = engine.compiled_steps.advance
    note = lambda *arguments: (rows.append(len(engine._scheduler.running)), advance(*arguments))[1]
    monkeypatch.setattr(engine.compiled_steps, "advance", note)
    monkeypatch.setattr(engine, "config", dataclasses.replace(CONFIG, chunks_per_call=chunks))
    asked = [Request((4 + i,), KINDS[1]) for i in range(3)]
    with held(engine) as running:
        others = [engine.submit(request) for request in asked]
    assert [ids(handle) for handle in others] == [expected(request.prompt_ids, KINDS[1]) for request in asked]
    list(running)
    assert rows[:2] == [1, 1 + chunks]
    wait_idle(engine)
