"""The planner's arithmetic, its estimates, and that it finds the k that pays when that changes."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specformer_jax.engine import step_costs
from specformer_jax.errors import UserError
from specformer_jax.planning import planner
from specformer_jax.planning.cost_table import CostTable
from specformer_jax.planning.planner import AcceptanceCounts, Planner, best, expected_tokens
from tests.engine import tiny_lm

J = 4
shares = st.lists(st.floats(0, 1), min_size=J, max_size=J).map(lambda xs: np.sort(xs)[::-1])


def tracked(policy):
    return AcceptanceCounts(len(policy.everyone.trials), planner.REQUEST_MEMORY)


def table(*seconds, sizes=(1,)):
    return CostTable({(size, k): s for size in sizes for k, s in enumerate(seconds)}, "test")


@given(rows=st.lists(st.tuples(shares, st.integers(0, J)), min_size=1, max_size=5), k=st.integers(0, J))
def test_expected_tokens_row_by_row(rows, k):
    acceptance, caps = np.array([a for a, _ in rows]), np.array([cap for _, cap in rows])
    by_hand = sum(1 + sum(a[: min(k, cap)]) for a, cap in rows)
    assert expected_tokens(acceptance, caps, k) == pytest.approx(by_hand)


@given(
    rates=st.dictionaries(st.integers(0, J), st.floats(1, 100), min_size=1),
    current=st.one_of(st.none(), st.integers(0, J)),
)
def test_best_is_best_within_the_margin(rates, current):
    k, top = best(rates, current), max(rates.values())
    assert rates[k] * (1 + planner.MARGIN) >= top
    if k != 0:
        assert 0 not in rates or top > rates[0] * (1 + planner.MARGIN)
        kept = current if current in rates and top <= rates[current] * (1 + planner.MARGIN) else None
        assert rates[k] * (1 + planner.NEARLY) >= (top if kept is None else rates[kept])
        assert kept is None or k <= kept


@given(
    prior=shares,
    weight=st.floats(0.1, 100),
    passes=st.lists(st.tuples(st.integers(0, J), st.integers(0, J)), max_size=30),
)
def test_estimates_are_shares(prior, weight, passes):
    counts = AcceptanceCounts(J, 10.0)
    for drafted, accepted in passes:
        stood = np.arange(J) < drafted
        counts.observe(stood.astype(int), (stood & (np.arange(J) < accepted)).astype(int))
    estimate = counts.estimate(prior, weight)
    assert (estimate >= 0).all() and (estimate <= 1).all()


def test_estimates_follow_what_happens_and_forget():
    counts, random = AcceptanceCounts(J, 100.0), np.random.default_rng(0)
    prior = np.full(J, 0.5)
    for truth in (0.9, 0.2):
        for _ in range(2000):
            right = np.cumprod(random.random(J) < truth)
            counts.observe(np.ones(J, int), right)
        assert counts.estimate(prior, 0.1)[:2] == pytest.approx([truth] * 2, abs=0.2)


def test_positions_that_were_not_drafted_keep_their_estimate():
    counts = AcceptanceCounts(J, 50.0)
    counts.observe(np.full(J, 100), np.full(J, 60))
    before = counts.estimate(np.full(J, 0.1), 1.0)
    for _ in range(500):
        counts.observe(np.array([1, 0, 0, 0]), np.array([1, 0, 0, 0]))
    assert before[1:] == pytest.approx([1.0] * 3, abs=0.03)
    after = counts.estimate(np.full(J, 0.1), 1.0)
    assert after[1:] == pytest.approx(before[1:]) and after[0] > 0.9


def simulate(policy, truth, calls, caps=(J,), size=1, seed=0):
    """Calls of one step in which each row's drafts are right with the odds `truth`; returns the k taken."""
    random = np.random.default_rng(seed)
    rows = [(tracked(policy), cap) for cap in caps]
    taken = []
    for _ in range(calls):
        plan = policy.choose(size, rows, explore=True)
        taken.append(plan.draft_length)
        for request, cap in rows:
            drafted = np.arange(J) < min(plan.draft_length, cap)
            right = np.cumprod(random.random(J) < truth) * drafted
            policy.observe(request, drafted.astype(int), right.astype(int))
    return taken


@pytest.mark.parametrize("truth", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("step", [0.02, 0.2, 0.6])
def test_it_settles_on_the_best_k(truth, step):
    """A step costs 1 + step * k; the rate of what it takes most is within the margin of the best there is."""
    seconds = [1 + step * k for k in range(J + 1)]
    taken = simulate(Planner(table(*seconds), J), truth, 3000)[1500:]
    rate = [sum(truth**j for j in range(k + 1)) / seconds[k] for k in range(J + 1)]
    k = max(set(taken), key=taken.count)
    assert rate[k] >= max(rate) * 0.95
    assert np.mean([rate[k] for k in taken]) >= max(rate) * 0.94, "exploring costs too much"


def test_plain_decoding_is_left_again_when_drafts_become_right():
    policy = Planner(table(1.0, 1.2, 1.4, 1.6, 1.8), J)
    poor = simulate(policy, 0.01, 2000)
    assert poor[-200:].count(0) > 190
    good = simulate(policy, 0.95, 40 * planner.EXPLORE_EVERY)
    assert np.mean(np.array(good[-200:]) >= 3) > 0.9


def test_caps_are_kept_and_drafts_nobody_takes_are_not_made():
    policy = Planner(table(1.0, 1.01, 1.02, 1.03, 1.04), J)
    assert set(simulate(policy, 0.9, 300, caps=(0, 0))) == {0}
    assert max(simulate(policy, 0.9, 300, caps=(2, 0))) == 2
    # One row of eight that drafts does not pay for the width of all.
    policy = Planner(table(1.0, 1.3, 1.6, 1.9, 2.2), J)
    assert simulate(policy, 0.9, 100, caps=(J,) + (0,) * 7).count(0) > 95


def test_a_prior_decides_the_first_step():
    seconds = table(1.0, 1.2, 1.4, 1.6, 1.8)
    for prior, k in (((0.9, 0.8, 0.7, 0.6), 4), ((0.05,), 0)):
        policy = Planner(seconds, J, prior)
        assert policy.choose(1, [(tracked(policy), J)], explore=True).draft_length == k


def test_tables_are_saved_and_read(tmp_path):
    wanted = table(1.0, 2.0, sizes=(1, 4))
    wanted.save(tmp_path / "a" / "costs.json")
    assert CostTable.load(tmp_path / "a" / "costs.json") == wanted
    (tmp_path / "bad.json").write_text('{"source": "x", "steps": [{"rows": 1, "k": 0, "seconds": 0}]}')
    for name in ("bad.json", "none.json"):
        with pytest.raises(UserError, match="is no cost table"):
            CostTable.load(tmp_path / name)


def test_measuring_compares_what_stands_side_by_side(monkeypatch):
    """A machine that slows down by the minute does not make the k timed last look dear."""
    clock = iter(np.geomspace(1.0, 8.0, 200))
    monkeypatch.setattr(
        step_costs, "_time_call", lambda compiled_steps, state, k: (state, next(clock) * (1 + 0.25 * k))
    )
    monkeypatch.setattr(step_costs, "source", lambda compiled_steps: "here")
    compiled_steps = type(
        "Steps", (), {"sizes": (1, 2), "draft_lengths": (0, 1, 2), "empty": lambda self, size: None}
    )()
    found = step_costs.measure(compiled_steps)
    for size in (1, 2):
        ratios = [found.seconds[size, k] / found.seconds[size, 0] for k in (0, 1, 2)]
        assert ratios == pytest.approx([1.0, 1.25, 1.5], rel=0.03)


def test_a_table_must_hold_every_step():
    table(1.0, 2.0, sizes=(1, 2)).check((1, 2))
    with pytest.raises(UserError, match="no step of 4 rows and 0 drafts"):
        table(1.0, 2.0, sizes=(1, 2)).check((1, 2, 4))


def test_a_table_of_something_else_is_measured_anew(tmp_path, monkeypatch):
    path, made = tmp_path / "costs.json", table(1.0, 2.0)
    measured = dataclasses.replace(made, source="here")
    compiled_steps = type("Steps", (), {"sizes": (1,), "draft_lengths": (0, 1)})
    monkeypatch.setattr(step_costs, "measure", lambda compiled_steps: measured)
    monkeypatch.setattr(step_costs, "source", lambda compiled_steps: "here")
    made.save(path)
    assert step_costs.load_or_measure(compiled_steps, path) == measured == CostTable.load(path)
    monkeypatch.setattr(step_costs, "measure", None)
    assert step_costs.load_or_measure(compiled_steps, path) == measured


def test_a_table_is_of_one_layout_and_one_way_to_draft():
    lm = tiny_lm.make()
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "model"), devices=jax.devices()[:1])
    placed = jax.device_put(lm.params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    ways = ((lm, lm.params), (lm, placed), (lm.without_lookup(), lm.params), (lm.without_drafter(), lm.params))
    compiled_steps = [
        types.SimpleNamespace(model=way.model, params=params, context=64, steps=4) for way, params in ways
    ]
    assert len({step_costs.source(p) for p in compiled_steps}) == len(compiled_steps)


@settings(max_examples=20, deadline=None)
@given(prior=shares, size=st.sampled_from([1, 4]), drafts=st.lists(st.integers(0, J), min_size=1, max_size=4))
def test_a_forecast_is_never_below_plain_decoding(prior, size, drafts):
    policy = Planner(table(1.0, 1.3, 1.5, 1.9, 2.2, sizes=(1, 4)), J, list(prior))
    plan = policy.choose(size, [(tracked(policy), cap) for cap in drafts], explore=False)
    assert plan.tokens_per_second >= len(drafts) / 1.0 - 1e-9
