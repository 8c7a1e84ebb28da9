"""The engine on the tiny model: the right tokens in every company, and nothing lost, mixed up, late or compiled."""

import contextlib
import dataclasses
import functools
import itertools
import threading
import time

import jax
import numpy as np
import pytest
import tiny
import tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from specformer_jax import engine as engine_module
from specformer_jax import generation, jobs, slots
from specformer_jax.config import SamplingParams, Shape, UserError
from specformer_jax.engine import Engine, EngineConfig
from specformer_jax.prefixes import Prefixes
from specformer_jax.request import QueueFull, Request, Stopped
from specformer_jax.stops import FinalText

CONFIG = EngineConfig(slots=4, max_context=76, chunk=16, max_queue=64, draft_lengths=tiny_lm.DRAFT_LENGTHS)
KINDS = [
    SamplingParams(max_new_tokens=24),
    SamplingParams(temperature=0.7, top_p=0.9, min_p=0.05, seed=1, max_new_tokens=24),
    SamplingParams(temperature=1.3, top_k=4, seed=2**32 - 1, max_new_tokens=17),
    SamplingParams(temperature=1.0, seed=7, max_new_tokens=1),
]
LONG = (6, 5) * 24  # three chunks
PROMPTS = [(5, 1, 2, 11, 7), (4,), tuple(range(4, 12)), LONG[:18], LONG, (*LONG[:30], 1, 2)]
ENDLESS = Request((5, 1, 2), SamplingParams(temperature=1.2, seed=5, max_new_tokens=73))


@pytest.fixture(scope="module")
def lm():
    return tiny_lm.make()


@pytest.fixture(scope="module")
def engine(lm):
    """One for all tests that leave it as they found it."""
    with Engine(lm, CONFIG, tiny_lm.Cycle()) as engine:
        yield engine


@functools.cache
def expected(prompt, params):
    return tiny_lm.naive(tiny_lm.make(), prompt, params)


def ids(handle) -> list[int]:
    return [token.id for delta in handle for token in delta.tokens]


def wait_idle(engine):
    """Until every slot is free; a slot that leaks fails here."""
    until = time.monotonic() + 30
    while engine.stats().running or engine.stats().queued:
        assert time.monotonic() < until, engine.stats()
        time.sleep(0.005)


@contextlib.contextmanager
def held(engine):
    """The engine stands still at its next decode call until the block ends; at least one request must be there."""
    reached, go = threading.Event(), threading.Event()
    advance = engine.programs.advance

    def waiting(*arguments):
        reached.set()
        assert go.wait(60)
        return advance(*arguments)

    engine.programs.advance = waiting
    first = engine.submit(ENDLESS)
    assert reached.wait(60)
    try:
        yield first
    finally:
        engine.programs.advance = advance
        go.set()


def test_the_endless_request_is_long():
    assert len(expected(ENDLESS.prompt_ids, ENDLESS.params)) > 40


def test_same_tokens_in_any_company_at_any_k_and_with_any_prefix(engine):
    asked = []
    for i in range(24):
        prompt, params = PROMPTS[i % 6], KINDS[i % 4]
        speculative = ("auto", "off", 1, 2)[i // 6]
        asked.append((Request(prompt, params, speculative, logprobs=2 if i % 5 == 0 else None), i))
    handles = [engine.submit(request) for request, _ in asked]
    cached = 0
    for (request, i), handle in zip(asked, handles, strict=True):
        deltas = list(handle)
        answer = expected(request.prompt_ids, request.params)
        assert [token.id for delta in deltas for token in delta.tokens] == answer, i
        assert deltas[-1].finish_reason == ("stop" if answer[-1] == 3 else "length")
        usage = deltas[-1].usage
        assert usage.completion_tokens == len(answer)
        assert usage.completion_tokens == 1 + usage.steps + sum(usage.accepted_per_position)
        if request.speculative == "off":
            assert usage.drafted_tokens == 0
        assert all(accepted == 0 for accepted in usage.accepted_per_position[2 if request.speculative == 2 else 3 :])
        cached += usage.cached_tokens
    assert cached > 0, "no prefix was reused: the test proves nothing"
    assert engine.stats().accepted_tokens > 0, "no draft was right: the test proves nothing"
    wait_idle(engine)


def test_alone_is_as_among_others(engine):
    for prompt, params in zip(PROMPTS, [*KINDS, *KINDS], strict=False):
        assert ids(engine.submit(Request(prompt, params))) == expected(prompt, params)


def test_a_reused_prefix_is_as_good_as_one_that_was_read(engine):
    """Every layer of the cache is what reading the whole prompt makes it, the head's with the right next tokens."""
    whole = tuple(np.random.default_rng(5).integers(4, 13, 45).tolist())
    asked = [Request((*whole[:n], 1), KINDS[3]) for n in (44, 41, 37)]

    def read(request):
        """How many tokens were cached, and keys and values of every layer at the prompt's positions."""
        [*deltas] = engine.submit(request)
        wait_idle(engine)
        rows = [kept for kept in engine._batch._prefixes._kept if tuple(kept.tokens) == request.prompt_ids]
        [row] = rows[-1:]
        cache = [np.asarray(x)[0, :, : len(request.prompt_ids)] for x in jax.tree.leaves(row.state.cache)]
        return deltas[-1].usage.cached_tokens, np.stack(cache)

    fresh = []
    for request in asked:
        engine._batch._prefixes = Prefixes(engine.programs, CONFIG.prefixes)
        cached, cache = read(request)
        assert cached == 0
        fresh.append(cache)
    engine._batch._prefixes = Prefixes(engine.programs, CONFIG.prefixes)
    read(Request(whole, KINDS[3]))
    for request, expected_cache in zip(asked, fresh, strict=True):
        cached, cache = read(request)
        assert cached == len(request.prompt_ids) - 2
        assert np.abs(cache - expected_cache).max() < 1e-4


def test_what_was_drafted_is_told(engine):
    [*deltas] = engine.submit(dataclasses.replace(ENDLESS, speculative=3))
    tokens = [token for delta in deltas for token in delta.tokens]
    flags = [token.drafted for token in tokens]
    assert any(flags) and not flags[0]
    # Each pass ends with the target's own token, so the others are the accepted drafts.
    assert sum(not flag for flag in flags[1:]) in (deltas[-1].usage.steps, deltas[-1].usage.steps - 1)
    assert "".join(delta.text for delta in deltas) == engine.lm.tokenizer.decode([token.id for token in tokens])


def test_logprobs_are_of_the_raw_logits(engine):
    request = Request(PROMPTS[0], KINDS[2], logprobs=3)
    so_far = list(request.prompt_ids)
    for delta in engine.submit(request):
        for token in delta.tokens:
            logits = tiny.next_logits(engine.lm.model, engine.lm.params, so_far)
            logprobs = logits - np.logaddexp.reduce(logits)
            assert token.logprob == pytest.approx(logprobs[token.id], abs=1e-3)
            assert [id for id, _ in token.top] == np.argsort(-logprobs)[:3].tolist()
            assert [value for _, value in token.top] == pytest.approx(np.sort(logprobs)[::-1][:3], abs=1e-3)
            so_far.append(token.id)


def test_nothing_compiles_under_load(engine):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: compiled.append(event))
    jax.jit(lambda x: x + 17.5)(1.0)
    assert any("compile" in event for event in compiled), "compilations are not seen"
    compiled.clear()
    handles = [
        engine.submit(Request(prompt, params, logprobs=i % 3)) for i, prompt in enumerate(PROMPTS) for params in KINDS
    ]
    handles[3].cancel()
    for handle in handles:
        list(handle)
    for _ in range(3):  # and the batch shrinks again
        list(engine.submit(ENDLESS))
    assert not [event for event in compiled if "compile" in event]


@pytest.mark.parametrize("program", ["advance", "read_chunk", "insert"])
def test_states_are_updated_in_place(lm, program):
    """The donated state aliases the result, and no copy of the cache is among the temporaries."""
    rows = 1 if program == "read_chunk" else 4
    state = jax.eval_shape(lambda: slots.empty(lm.model, Shape(rows, 4, 16, 4096), 64))
    one = jax.eval_shape(lambda: slots.empty(lm.model, Shape(1, 4, 16, 4096), 64))
    number, row = jax.ShapeDtypeStruct((), "int32"), jax.ShapeDtypeStruct((1,), "int32")
    lowered = {
        "advance": lambda: slots.jit_advance.lower(
            lm.model, lm.params, state, jax.ShapeDtypeStruct((rows,), bool), number, draft_length=3, width=16
        ),
        "read_chunk": lambda: slots.jit_read_chunk.lower(
            lm.model, lm.params, state, jax.ShapeDtypeStruct((1, 4), "int32"), row, row, width=16
        ),
        "insert": lambda: slots.jit_insert.lower(state, one, number),
    }[program]()
    memory = lowered.compile().memory_analysis()
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 2


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("ab#", max_size=3), max_size=12),
    stops=st.lists(st.text("ab#", min_size=1, max_size=3), max_size=3),
)
def test_text_before_a_stop_string_is_the_same_in_any_pieces(pieces, stops):
    class Pieces:
        def __init__(self):
            self.out = iter(pieces)

        def push(self, ids):
            return next(self.out)

        def finish(self):
            return ""

    text, got = FinalText(Pieces(), stops), ""
    for i in range(len(pieces)):
        got += text.push(i)
        if text.stopped:
            break
    got += text.finish()
    whole = "".join(pieces)
    places = [(whole.index(stop) + len(stop), whole.index(stop)) for stop in stops if stop in whole]
    assert text.stopped == bool(places)
    assert got == whole[: min(places)[1] if places else len(whole)]


def test_stop_strings_across_tokens_end_the_answer(engine):
    answer = expected(ENDLESS.prompt_ids, ENDLESS.params)
    whole = engine.lm.tokenizer.decode(answer)
    stop = next(whole[i : i + 3] for i in range(8, 40) if whole.index(whole[i : i + 3]) == i)
    [*deltas] = engine.submit(dataclasses.replace(ENDLESS, stop=(stop, "zzz")))
    assert "".join(delta.text for delta in deltas) == whole[: whole.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].usage.completion_tokens == whole.index(stop) + 3
    wait_idle(engine)


def test_stop_tokens_end_the_answer(engine):
    answer = expected(ENDLESS.prompt_ids, ENDLESS.params)
    token = next(token for i, token in enumerate(answer) if i > 6 and answer.index(token) == i)
    [*deltas] = engine.submit(dataclasses.replace(ENDLESS, stop_token_ids=(token,)))
    got = [t.id for delta in deltas for t in delta.tokens]
    assert got == answer[: answer.index(token) + 1] and deltas[-1].finish_reason == "stop"
    assert "".join(delta.text for delta in deltas) == engine.lm.tokenizer.decode(got[:-1])


def test_cancelling_frees_the_slot(engine):
    for _ in range(3):
        handles = [engine.submit(ENDLESS) for _ in range(6)]  # more than slots: some are cancelled in the queue
        next(handles[0])
        for handle in handles:
            handle.cancel()
        reasons = {list(handle)[-1].finish_reason for handle in handles}
        assert reasons <= {"cancelled", "length", "stop"} and "cancelled" in reasons
        wait_idle(engine)
    assert ids(engine.submit(Request(PROMPTS[4], KINDS[1]))) == expected(PROMPTS[4], KINDS[1])


def test_deadlines(engine):
    with held(engine):
        waiting = engine.submit(dataclasses.replace(ENDLESS, timeout=0.05))
        queued = [engine.submit(dataclasses.replace(ENDLESS, timeout=0.05)) for _ in range(6)]
        time.sleep(0.1)
    for handle in (waiting, *queued):
        last = list(handle)[-1]
        assert last.finish_reason == "deadline" and last.usage.seconds >= 0.05
    wait_idle(engine)


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


def test_an_exception_in_a_step_fails_what_is_in_flight_and_nothing_else(engine, caplog):
    advance = engine.programs.advance

    def fail(*_):
        engine.programs.advance = advance
        raise RuntimeError("the device has gone")

    engine.programs.advance = fail
    handles = [engine.submit(ENDLESS) for _ in range(6)]
    answers = [list(handle) for handle in handles]
    assert answers[0][-1].finish_reason == "error" and "the device has gone" in answers[0][-1].error
    assert "a step failed" in caplog.text
    for deltas in answers[2:]:  # one may have been read ahead
        assert [t.id for delta in deltas for t in delta.tokens] == expected(ENDLESS.prompt_ids, ENDLESS.params)
    assert engine.stats().healthy
    wait_idle(engine)


def test_a_long_prompt_delays_others_by_one_chunk_at_most(engine, monkeypatch):
    calls: list[str] = []
    for name in ("advance", "read_chunk"):
        program = getattr(engine.programs, name)
        monkeypatch.setattr(
            engine.programs, name, lambda *a, name=name, program=program: (calls.append(name), program(*a))[1]
        )
    with held(engine) as running:
        calls.clear()
        long = engine.submit(Request(tuple(np.random.default_rng(0).integers(4, 13, 70).tolist()), KINDS[0]))
    list(long), list(running)
    first, last = calls.index("read_chunk"), len(calls) - calls[::-1].index("read_chunk")
    assert calls[first:last].count("read_chunk") == 5
    assert "read_chunk" not in [b for a, b in itertools.pairwise(calls) if a == "read_chunk"]
    wait_idle(engine)


def test_a_free_slot_is_filled_before_rows_go_on(engine, monkeypatch):
    """One step a call while a prompt waits for a slot that is free, several once all are taken."""
    calls: list[tuple[int, int, int]] = []
    advance = engine.programs.advance

    def note(state, stop, steps, draft_length):
        calls.append((steps, len(engine._batch.running), engine.stats().queued))
        return advance(state, stop, steps, draft_length)

    monkeypatch.setattr(engine.programs, "advance", note)
    with held(engine) as running:
        others = [engine.submit(Request((4 + i,), KINDS[0])) for i in range(6)]
    for handle in (*others, running):
        list(handle)
    # The first call was planned before the others came.
    filling = [steps for steps, rows, queued in calls[1:] if rows < CONFIG.slots and queued]
    assert len(filling) >= 2 and set(filling) == {1}
    assert {steps for steps, rows, _ in calls if rows == CONFIG.slots} == {CONFIG.steps_per_call}
    wait_idle(engine)


def test_mistakes_are_named(engine):
    for request, message in (
        (Request((5,) * 76), "the prompt has 76 tokens, but the context holds 76"),
        (Request((13,)), "not within the vocabulary of 13"),
        (Request((5,), speculative=4), "draft length 4 is out of range"),
        (Request((5,), logprobs=14), "logprobs 14 is more than the 13"),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit(request)
    with pytest.raises(UserError, match="max_context 300 is more than the 256"):
        Engine(engine.lm, dataclasses.replace(CONFIG, max_context=300))


def test_an_answer_ends_where_the_context_ends(engine):
    request = Request(ENDLESS.prompt_ids * 22, dataclasses.replace(ENDLESS.params, max_new_tokens=500, seed=3))
    [*deltas] = engine.submit(request)
    made = deltas[-1].usage.completion_tokens
    assert deltas[-1].finish_reason == "stop" or made == CONFIG.max_context - len(request.prompt_ids)


def test_stopping_drains_or_cancels(lm):
    engine = Engine(lm, CONFIG, tiny_lm.Cycle())
    handles = [engine.submit(Request(prompt, KINDS[0])) for prompt in PROMPTS]
    engine.stop(drain_seconds=60)
    assert [ids(handle) for handle in handles] == [expected(prompt, KINDS[0]) for prompt in PROMPTS]
    with pytest.raises(Stopped):
        engine.submit(ENDLESS)
    engine = Engine(lm, CONFIG, tiny_lm.Cycle())
    handles = [engine.submit(ENDLESS) for _ in range(40)]
    engine.stop()
    assert "cancelled" in {list(handle)[-1].finish_reason for handle in handles}


def test_a_file_of_prompts_and_its_resumption(engine, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"id": "x", "prompt": "fbcl"}\n{"id": "y", "turns": ["e", "ee"]}\n{"id": "z", "prompt": "%s"}\n' % ("f" * 80)
    )
    assert engine.run_file(source, output, params=KINDS[0], raw=True) == 4
    rows = jobs.AnswerFile(output, resume=True).done
    assert rows["x", 0]["token_ids"] == expected((5, 1, 2, 11), KINDS[0])
    second = (4, *engine.lm.tokenizer.encode(rows["y", 0]["text"]), 4, 4)
    assert rows["y", 1]["token_ids"] == expected(second, KINDS[0])
    assert "80 tokens" in rows["z", 0]["error"]
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:2]) + lines[2][:10])  # killed while it wrote the third
    assert engine.run_file(source, output, params=KINDS[0], raw=True, resume=True) == 2
    assert jobs.AnswerFile(output, resume=True).done == rows


@pytest.mark.slow
def test_200_mixed_requests_as_generate_answers_them(lm):
    """Against `generation.generate_ids`, one call for each kind of sampling, among 64 others in 8 slots."""
    random = np.random.default_rng(1)
    config = dataclasses.replace(CONFIG, slots=8, max_queue=200, draft_lengths=None)
    requests = []
    for i in range(200):
        shared = LONG[: int(random.integers(0, 40))] if i % 2 else ()
        own = random.integers(4, 13, int(random.integers(1, 12))).tolist()
        params = dataclasses.replace(KINDS[i % 4], seed=int(random.integers(2**32)), max_new_tokens=1 + i % 24)
        requests.append(Request((*shared, *own), params, speculative=("auto", "off", 1, 3)[i // 50]))
    with Engine(lm, config, tiny_lm.Cycle((0, 1, 2, 3))) as engine:
        handles = [engine.submit(request) for request in requests]
        got = [ids(handle) for handle in handles]
        assert engine.stats().cached_tokens > 0 and engine.stats().accepted_tokens > 0
    for request, answer in zip(requests, got, strict=True):
        [(_, reference)] = generation.generate_ids(
            lm, [request.prompt_ids], request.params, draft_length=2, shape=Shape(4, 4, 16, 80)
        )
        assert answer == reference.token_ids
