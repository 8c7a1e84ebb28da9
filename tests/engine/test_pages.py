"""The engine and its pages: reuse, preemption, chunks of prompts, and none lost."""

import contextlib
import dataclasses
import random
import time

import numpy as np
import pytest

from specformer_jax.config import SamplingParams
from specformer_jax.engine import Engine, EngineConfig
from specformer_jax.engine.request import Request
from tests.engine import tiny_lm
from tests.engine.tiny_engine import CONFIG, ENDLESS, KINDS, LONG, PAGE, PROMPTS, expected, held, ids, wait_idle

SMALL = dataclasses.replace(CONFIG, cache_positions=7 * PAGE)  # one request alone may take five of the seven pages


@pytest.fixture(scope="module")
def small(lm):
    """An engine whose rows want twice as many pages as there are."""
    with Engine(lm, SMALL, tiny_lm.Cycle()) as engine:
        assert engine.stats().pages == 7
        yield engine


@contextlib.contextmanager
def called(engine, monkeypatch):
    """The budgets that are called within the block, and in how many steps."""
    budgets = []
    advance = engine.compiled_steps.advance

    def note(state, control, steps, budget):
        budgets.append((budget, steps))
        return advance(state, control, steps, budget)

    with monkeypatch.context() as patch:
        patch.setattr(engine.compiled_steps, "advance", note)
        yield budgets


def prompt_of(length, seed):
    return tuple(np.random.default_rng(seed).integers(4, 13, length).tolist())


def test_preempted_requests_end_with_the_same_tokens(small):
    before = small.stats().preempted
    asked = [Request(PROMPTS[i % 6], dataclasses.replace(KINDS[i % 3], max_new_tokens=26)) for i in range(12)]
    asked += [ENDLESS] * 4
    handles = [small.submit(request) for request in asked]
    for request, handle in zip(asked, handles, strict=True):
        [*deltas] = handle
        answer = expected(request.prompt_ids, request.sampling_params)
        assert [token.id for delta in deltas for token in delta.tokens] == answer
        usage = deltas[-1].usage
        assert usage.completion_tokens == len(answer) == 1 + usage.steps + sum(usage.accepted_per_position)
    assert small.stats().preempted > before, "nobody had to leave a row: the test proves nothing"
    wait_idle(small)


def test_a_prompt_is_counted_once_however_often_it_is_read(small):
    before, preempted = small.stats(), small.stats().preempted
    for handle in [small.submit(ENDLESS) for _ in range(6)]:
        list(handle)
    wait_idle(small)
    after = small.stats()
    assert after.preempted > preempted
    assert after.prompt_tokens - before.prompt_tokens == 6 * 3 and after.cached_tokens == before.cached_tokens


def test_a_request_that_fills_the_cache_alone_runs_among_others(small):
    large = Request(prompt_of(60, 0), SamplingParams(temperature=1.0, seed=9, max_new_tokens=16))
    others = [small.submit(Request(PROMPTS[i % 6], KINDS[1])) for i in range(6)]
    handle = small.submit(large)
    others += [small.submit(Request(PROMPTS[i % 6], KINDS[2])) for i in range(6)]
    assert ids(handle) == expected(large.prompt_ids, large.sampling_params)
    for other in others:
        list(other)
    wait_idle(small)


def test_who_goes_first_by_priority_is_not_preempted_for_who_goes_last(small):
    with held(small) as first:
        first.cancel()
        late = [small.submit(dataclasses.replace(ENDLESS, priority=9)) for _ in range(3)]
        urgent = small.submit(dataclasses.replace(ENDLESS, priority=-9))
    order = []
    for name, handle in (("late", late[0]), ("late", late[1]), ("late", late[2]), ("urgent", urgent)):
        handle.subscribe(lambda delta, name=name: order.append(name) if delta.finish_reason else None)
    wait_idle(small)
    assert order[0] == "urgent"


@pytest.mark.slow
def test_three_times_as_many_requests_run_as_there_would_be_rows_of_whole_contexts(lm):
    """Lengths are those of ShareGPT, an eighth of each: 161 prompt tokens and 338 answered ones of 2,048 on average."""
    context, whole = 256, 4
    config = EngineConfig(
        rows=32, max_context=context, cache_positions=whole * context, chunk=32, max_queue=200, budgets=(32, 64)
    )
    rng = np.random.default_rng(0)

    def lengths(mean, most):  # of a lognormal as wide as that of chats
        return np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0, 150).astype(int), 1, most)

    with Engine(lm, config, tiny_lm.fixed()) as engine:
        handles = []
        for i, (prompt, answer) in enumerate(zip(lengths(20, 127), lengths(42, 128), strict=True)):
            sampling_params = SamplingParams(temperature=1.2, seed=i, max_new_tokens=int(answer))
            handles.append(engine.submit(Request(prompt_of(int(prompt), i), sampling_params)))
        running = []
        while (stats := engine.stats()).queued:
            running.append(stats.running)
            time.sleep(0.01)
        for handle in handles:
            assert ids(handle)
        wait_idle(engine)
    assert np.mean(running) >= 3 * whole, running


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_no_page_is_lost_in_hundreds_of_requests_that_come_and_go(small, seed):
    rng, before = random.Random(seed), small.stats().preempted
    pending = []
    for i in range(300):
        prompt = (*LONG[: rng.choice((0, 17, 40))], *prompt_of(rng.choice((3, 18)), rng.randrange(3)))
        longest = min(50, CONFIG.max_context - len(prompt))
        kind = dataclasses.replace(KINDS[1 + i % 2], seed=i % 5, max_new_tokens=rng.choice((1, 9, longest)))
        request = Request(prompt, kind)
        pending.append((request, small.submit(request)))
        if rng.random() < 0.3:
            rng.choice(pending)[1].cancel()
        if len(pending) > 20:
            check(*pending.pop(rng.randrange(len(pending))))
    for request, handle in pending:
        check(request, handle)
    wait_idle(small)
    assert small.stats().preempted > before


def check(request, handle):
    """The whole answer, or its beginning where it was cancelled."""
    [*deltas] = handle
    got = [token.id for delta in deltas for token in delta.tokens]
    answer = expected(request.prompt_ids, request.sampling_params)
    assert got == (answer[: len(got)] if deltas[-1].finish_reason == "cancelled" else answer)


def test_the_next_turn_of_a_chat_reads_only_what_is_new(engine):
    prompt, params = prompt_of(20, 1), SamplingParams(temperature=1.0, seed=3, max_new_tokens=30)
    answer = ids(engine.submit(Request(prompt, params)))
    assert len(prompt) + len(answer) > 2 * PAGE + 1, "the answer fills no page: the test proves nothing"
    second = (*prompt, *answer, 4, 6, 8)
    for _ in range(2):
        [*deltas] = engine.submit(Request(second, params))
        assert [token.id for delta in deltas for token in delta.tokens] == expected(second, params)
        # The last token of the answer was never read: it fills no page.
        assert deltas[-1].usage.cached_tokens >= (len(prompt) + len(answer) - 1) // PAGE * PAGE
    wait_idle(engine)


def test_after_a_reset_a_prompt_is_read_anew(engine):
    prompt = (*LONG[:40], 12)
    read = lambda: list(engine.submit(Request(prompt, KINDS[0])))
    first, again = read(), read()
    engine.reset_prefix_cache()
    anew = read()
    assert again[-1].usage.cached_tokens == 32 and anew[-1].usage.cached_tokens == 0
    for deltas in (again, anew):
        assert [token.id for delta in deltas for token in delta.tokens] == [t.id for d in first for t in d.tokens]
    assert read()[-1].usage.cached_tokens == 32


def test_a_beginning_that_many_requests_share_is_read_once(engine, monkeypatch):
    system = prompt_of(50, 2)
    asked = [Request((*system, 4 + i), KINDS[i % 3]) for i in range(8)]
    with called(engine, monkeypatch) as budgets:
        handles = [engine.submit(request) for request in asked]
        answers = [list(handle) for handle in handles]
    for request, deltas in zip(asked, answers, strict=True):
        assert [t.id for delta in deltas for t in delta.tokens] == expected(request.prompt_ids, request.sampling_params)
    assert sorted(deltas[-1].usage.cached_tokens for deltas in answers) == [0] + [48] * 7
    # 51 tokens of the first in chunks of 16, three of each other: one call each at most.
    assert sum(budget.chunk > 0 for budget, _ in budgets) <= 4 + 7
    wait_idle(engine)


def test_a_page_is_reused_only_where_the_token_after_it_is_the_same(engine):
    whole = prompt_of(2 * PAGE + 4, 3)
    list(engine.submit(Request(whole, KINDS[3])))
    other = 4 + (whole[2 * PAGE] - 3) % 9
    for end, cached in ((whole[2 * PAGE], 2 * PAGE), (other, PAGE)):
        prompt = (*whole[: 2 * PAGE], end, 5)
        [*deltas] = engine.submit(Request(prompt, KINDS[0]))
        assert deltas[-1].usage.cached_tokens == cached
        assert [token.id for delta in deltas for token in delta.tokens] == expected(prompt, KINDS[0])
    wait_idle(engine)


def test_a_long_prompt_costs_running_rows_a_chunk_a_step_at_most(engine, monkeypatch):
    params = SamplingParams(max_new_tokens=6)
    with called(engine, monkeypatch) as budgets:
        with held(engine) as running:
            long = engine.submit(Request(prompt_of(70, 4), params))
        made = []
        running.subscribe(lambda delta: made.append(len(delta.tokens)))
        assert ids(long) == expected(prompt_of(70, 4), params)
        running.cancel()
        wait_idle(engine)
    # The other's own prompt and five chunks, one after the other; the other row makes a token in each.
    assert [budget.chunk for budget, _ in budgets[:7]] == [16] * 6 + [0]
    assert {steps for _, steps in budgets[:6]} == {1} and all(made[:6])


def test_several_prompts_are_read_in_order_of_arrival(engine):
    order = []
    with held(engine) as first:
        for i in range(3):
            handle = engine.submit(Request(prompt_of(40, 10 + i), KINDS[3]))
            handle.subscribe(lambda delta, i=i: order.append(i) if delta.tokens else None)
        first.cancel()
    wait_idle(engine)
    assert order == [0, 1, 2]


def test_short_prompts_are_read_together(engine, monkeypatch):
    with called(engine, monkeypatch) as budgets:
        with held(engine) as first:
            handles = [engine.submit(Request(prompt_of(5, 20 + i), KINDS[0])) for i in range(3)]
        for i, handle in enumerate(handles):
            assert ids(handle) == expected(prompt_of(5, 20 + i), KINDS[0])
    assert [budget.chunk > 0 for budget, _ in budgets[:3]] == [True, True, False], "the first one's, then the others'"
    first.cancel()
    wait_idle(engine)
