"""The planner's arithmetic, and that it finds the size that pays when that changes."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specformer_jax.decoding.state import BINS
from specformer_jax.planning import planner
from specformer_jax.planning.calibration import Calibration
from specformer_jax.planning.cost_table import CostTable
from specformer_jax.planning.planner import FixedDrafts, Planner, Row, best, best_drafts

J = 4
SIZES = (1, 2, 3, 4, 5)
survivals = st.lists(st.floats(0, 1), min_size=J, max_size=J).map(lambda xs: np.sort(xs)[::-1])


def make(seconds, prior=None, per_position=0.0):
    """A planner whose step of T tokens takes seconds[T]."""
    return Planner(CostTable(seconds, per_position, "test"), Calibration(J, BINS), J, prior)


def linear(sizes, step):
    """Seconds by size: the smallest takes one, each further token `step`."""
    return {size: 1 + step * (size - min(sizes)) for size in sizes}


def sure(chance, cap=J, positions=100):
    """A row each of whose drafts is right so often, once all before it were."""
    return Row(np.cumprod(np.full(J, chance)), cap, positions)


def unknown(cap=J):
    return Row(None, cap, 100)


@given(rows=st.lists(st.tuples(survivals, st.integers(0, J)), min_size=1, max_size=5), count=st.integers(0, 5 * J))
def test_the_best_drafts_are_those_that_would_be_read(rows, count):
    found = best_drafts(np.array([s for s, _ in rows]), np.array([cap for _, cap in rows]))
    by_hand = sorted((x for s, cap in rows for x in s[:cap]), reverse=True)
    assert found[:count].sum() == pytest.approx(sum(by_hand[:count])) and len(found) == len(by_hand)


@given(
    rates=st.dictionaries(st.integers(1, 9), st.floats(1, 100), min_size=1),
    current=st.one_of(st.none(), st.integers(1, 9)),
)
def test_best_is_best_within_the_margin(rates, current):
    size, top = best(rates, current), max(rates.values())
    assert rates[size] * (1 + planner.MARGIN) >= top
    if size != min(rates):
        assert top > rates[min(rates)] * (1 + planner.MARGIN)
        kept = current if current in rates and top <= rates[current] * (1 + planner.MARGIN) else None
        assert rates[size] * (1 + planner.NEARLY) >= (top if kept is None else rates[kept])
        assert kept is None or size <= kept


@pytest.mark.parametrize(("plain", "chosen"), [({}, 8), ({4: 1.0}, 4)])
def test_plain_decoding_is_weighed_without_what_drafts_take(plain, chosen):
    """Five tokens in 1.3 seconds against four in 1.2, or in 1.0 where no drafts are made."""
    costs = CostTable({4: 1.2, 8: 1.3}, 0.0, "test", plain)
    plan = Planner(costs, Calibration(J, BINS), J).choose((4, 8), [Row(np.array([0.25, 0, 0, 0]), J, 100)] * 4)
    assert plan.size == chosen and (plan.draft_cap == 0) == (chosen == 4)
    assert plan.seconds == (plain or {8: 1.3})[chosen]


def test_rows_that_are_fewer_than_any_step_seats_may_decode_plainly():
    """Three rows in a step of four, which holds a draft that is worth less than making it."""
    costs = CostTable({4: 1.3, 8: 2.0}, 0.0, "test", {4: 1.0})
    plan = Planner(costs, Calibration(J, BINS), J).choose((4, 8), [Row(np.array([0.5, 0, 0, 0]), J, 100)] * 3)
    assert plan[:2] == (4, 0) and plan.tokens_per_second == 3.0


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.tuples(survivals, st.integers(0, J), st.integers(1, 9000)), min_size=1, max_size=4),
    step=st.floats(0.01, 1),
    per_position=st.floats(0, 1e-3),
)
def test_the_choice_is_the_best_expected_rate_within_the_margin(rows, step, per_position):
    sizes = [size for size in (1, 2, 4, 8, 20) if size >= len(rows)]
    seconds = linear(sizes, step)
    plan = make(seconds, per_position=per_position).choose(sizes, [Row(*row) for row in rows])
    drafts = sorted((x for s, cap, _ in rows for x in s[:cap]), reverse=True)
    positions = sum(row[2] for row in rows)
    tokens = {(size, True): len(rows) + sum(drafts[: size - len(rows)]) for size in sizes if size > len(rows)}
    tokens[sizes[0], False] = len(rows)
    rates = {step: made / (seconds[step[0]] + per_position * positions) for step, made in tokens.items()}
    chosen = plan.size, plan.draft_cap > 0
    assert rates[chosen] * (1 + planner.MARGIN) >= max(rates.values())
    assert plan.tokens_per_second == pytest.approx(rates[chosen])
    assert plan.seconds == pytest.approx(seconds[plan.size] + per_position * positions)


def simulate(policy, truth, calls, rows=1, caps=None, sizes=SIZES):
    """Calls whose drafts are right with the odds `truth`; returns the sizes taken.

    As in the engine, what is chosen next sees the call before the latest: that one is still under way.
    """
    reports, taken = collections.deque([False, False]), []
    for _ in range(calls):
        row = sure(truth) if reports.popleft() else unknown()
        plan = policy.choose(sizes, [row._replace(cap=cap) for cap in caps or [J] * rows])
        taken.append(plan.size)
        reports.append(plan.draft_cap > 0)
    return taken


@pytest.mark.parametrize("truth", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("step", [0.02, 0.2, 0.6])
def test_it_settles_on_the_best_size(truth, step):
    seconds = linear(SIZES, step)
    taken = simulate(make(seconds), truth, 3000)[1500:]
    rate = {size: sum(truth**j for j in range(size)) / seconds[size] for size in SIZES}
    assert rate[max(set(taken), key=taken.count)] >= max(rate.values()) * 0.95
    assert np.mean([rate[size] for size in taken]) >= max(rate.values()) * 0.94, "exploring costs too much"


def test_no_step_is_larger_than_the_drafts_fill():
    sizes = (1, 3, 5, 8, 16)
    assert set(simulate(make(linear(sizes, 0.01)), 0.9, 3 * planner.EXPLORE_EVERY, sizes=sizes)[5:]) == {5}
    capped = simulate(make(linear(sizes, 0.01)), 0.9, 3 * planner.EXPLORE_EVERY, caps=(1,), sizes=sizes)
    assert max(capped) == 3


def test_plain_decoding_is_left_again_when_drafts_become_right():
    policy = make(linear(SIZES, 0.2))
    poor = simulate(policy, 0.01, 2000)
    assert poor[-200:].count(1) > 190
    good = simulate(policy, 0.95, 40 * planner.EXPLORE_EVERY)
    assert np.mean(np.array(good[-200:]) >= 4) > 0.9


def test_exploring_has_a_call_that_makes_drafts_and_one_that_reads_them():
    policy = make(linear(SIZES, 0.9))
    taken = simulate(policy, 0.05, 3 * planner.EXPLORE_EVERY)
    larger = [n for n, size in enumerate(taken) if size > 1]
    assert larger[-2:] == [3 * planner.EXPLORE_EVERY - 2, 3 * planner.EXPLORE_EVERY - 1]


def test_a_sure_row_among_unsure_ones_gets_a_budget_for_itself():
    sizes = (4, 6, 8, 20)
    rows = [sure(0.98), sure(0.05), sure(0.05), sure(0.05)]
    assert make(linear(sizes, 0.1)).choose(sizes, rows).size == 8
    # Drafts as right as these are on average would pay for none.
    mean = Row(np.mean([row.survival for row in rows], axis=0), J, 100)
    assert make(linear(sizes, 0.3)).choose(sizes, [mean] * 4).size == 4
    assert make(linear(sizes, 0.2)).choose(sizes, rows).size == 8


def test_caps_are_kept_and_drafts_nobody_takes_are_not_made():
    seconds = linear((2, 3, 4, 6, 10), 0.01)
    assert set(simulate(make(seconds), 0.9, 300, caps=(0, 0), sizes=tuple(seconds))) == {2}
    assert max(simulate(make(seconds), 0.9, 300, caps=(2, 0), sizes=tuple(seconds))[:60]) == 4
    plan = make(seconds).choose(tuple(seconds), [unknown(0), unknown(0)])
    assert plan.draft_cap == 0


def test_a_prior_decides_the_first_step():
    for prior, size in (((0.9, 0.8, 0.7, 0.6), 5), ((0.05,), 1)):
        assert make(linear(SIZES, 0.2), prior).choose(SIZES, [unknown()]).size == size


def test_rows_whose_drafts_are_not_known_are_taken_for_typical_ones():
    policy = make(linear((2, 3, 4, 6, 10), 0.2), prior=(0.05,))
    for _ in range(200):
        policy.choose((2, 3, 4, 6, 10), [sure(0.95)] * 2)
    assert policy.choose((2, 3, 4, 6, 10), [unknown()] * 2).size == 10


def test_a_lone_row_keeps_its_step_though_its_drafts_are_now_sure_and_now_not():
    policy = make({1: 1.0, 2: 1.2, 3: 1.3})
    chains = [np.array([1.0, 1.0, 0, 0]), np.array([0.5, 0.1, 0, 0])]  # the second alone is worth T = 2, both T = 3
    sizes = [policy.choose((1, 2, 3), [Row(chains[i % 2], J, 10)]).size for i in range(40)]
    assert set(sizes) == {3}
    assert make({1: 1.0, 2: 1.2, 3: 1.3}).choose((1, 2, 3), [Row(chains[1], J, 10)]).size == 2


def test_a_close_rival_does_not_displace_what_is_taken():
    policy = make({1: 1.0, 2: 1.2, 3: 1.36})
    rows = lambda second: [Row(np.array([0.9, second, 0, 0]), J, 10)]
    assert policy.choose((1, 2, 3), rows(0.0)).size == 2
    assert policy.choose((1, 2, 3), rows(0.27)).size == 2, "1 % better is not enough"
    for _ in range(20):
        plan = policy.choose((1, 2, 3), rows(0.6))
    assert plan.size == 3


def test_long_contexts_count_for_what_reading_them_costs():
    """Reading the cache costs a step the same, whatever it verifies: where that dominates, drafts are nearly free."""
    seconds = linear(SIZES, 0.8)
    short, long = ([sure(0.6, positions=n)] for n in (100, 8000))
    assert make(seconds, per_position=1e-3).choose(SIZES, short).size == 1
    assert make(seconds, per_position=1e-3).choose(SIZES, long).size > 1
    assert make(seconds).choose(SIZES, long).size == 1, "where contexts cost nothing they change nothing"


@given(truth=st.floats(0, 1), step=st.floats(0.01, 1), per_position=st.floats(0, 1e-3))
def test_a_long_row_makes_nobody_draft_less(truth, step, per_position):
    sizes = (4, 6, 8, 12, 20)
    short = [sure(truth)] * 4
    mixed = [sure(truth, positions=8000), *short[1:]]
    chosen = [make(linear(sizes, step), per_position=per_position).choose(sizes, rows) for rows in (short, mixed)]
    rates = [plan.tokens_per_second for plan in chosen]
    assert chosen[1].size >= chosen[0].size and rates[1] <= rates[0] * (1 + planner.MARGIN)


def test_fixed_drafts_are_given_to_every_row_up_to_its_cap():
    policy = FixedDrafts(2, Calibration(J, BINS))
    rows = [unknown(), unknown(1), unknown(0)]
    assert policy.choose((3, 4, 6, 8), rows) == (6, 2, 0.0, 0.0)
    assert policy.choose((3, 4), rows).size == 4, "where there is no such step, the largest"


@settings(max_examples=20, deadline=None)
@given(prior=survivals, caps=st.lists(st.integers(0, J), min_size=1, max_size=4))
def test_a_forecast_is_never_below_plain_decoding(prior, caps):
    sizes = (4, 6, 8, 12, 20)
    policy = make(linear(sizes, 0.1), list(prior))
    plan = policy.choose(sizes, [unknown(cap) for cap in caps])
    assert plan.tokens_per_second * (1 + planner.NEARLY) >= len(caps)
