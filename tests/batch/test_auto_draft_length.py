"""The automatic draft length: what it takes at which costs, that it measures once, that no answer depends on it."""

import json
import shutil

import pytest

from specformer_jax import files
from specformer_jax.batch import auto_draft_length, compile_clock, generation
from specformer_jax.batch.compile_clock import CompileClock
from specformer_jax.config import DraftConfig, SamplingParams, Shape
from specformer_jax.decoding import decode
from specformer_jax.loading.language_model import LanguageModel
from tests import tiny

J = 4
PROMPTS = [[5, 1, 2], [4], [6, 5, 6, 5, 7]]
PARAMS = SamplingParams(max_new_tokens=12)
COSTS = {  # seconds of a step by k -> the k that pays, where four drafts in ten are right
    0: {0: 1.0, 1: 1.5, 2: 1.7, J: 2.0},
    1: {0: 1.0, 1: 1.1, 2: 1.5, J: 2.0},
    2: {0: 1.0, 1: 1.2, 2: 1.2, J: 2.0},
    J: {0: 1.0, 1: 1.2, 2: 1.2, J: 1.2},
}


class Spelled:
    def decode(self, ids, after=()):
        return " ".join(map(str, ids))


def language_model(**draft):
    model, params = tiny.make(DraftConfig(max_draft_length=J, **draft))
    return LanguageModel("tiny", model, params, Spelled(), None)


@pytest.fixture
def lm():
    return language_model()


@pytest.fixture
def measured(monkeypatch):
    """Costs that a test may set, in place of timing; the shapes that were asked for."""
    asked, costs = [], {}
    monkeypatch.setattr(auto_draft_length, "_chosen", {})
    monkeypatch.setattr(
        auto_draft_length, "measure", lambda lm, shapes, params: asked.append(shapes) or {k: costs[k] for k in shapes}
    )
    return asked, costs


def shapes(rows, window=None):
    return lambda k: Shape(rows, window or k + 1, 64, 96 + (window or k + 1))


def run(lm, prompts, **options):
    found = dict(generation.generate_ids(lm, prompts, PARAMS, **options))
    return [found[i].token_ids for i in range(len(prompts))], {len(a.accepted_per_position) for a in found.values()}


@pytest.mark.parametrize("k", COSTS)
def test_it_takes_what_pays(lm, measured, k):
    measured[1].update(COSTS[k])
    assert auto_draft_length.choose(lm, shapes(4), PARAMS) == k


@pytest.mark.parametrize("drafter, k", [("specformer", 0), ("specformer", J), ("ngram", 1)])
def test_answers_do_not_depend_on_it(measured, drafter, k):
    lm = language_model(drafter=drafter)
    measured[1].update(COSTS[k])
    assert run(lm, PROMPTS) == (run(lm, PROMPTS, draft_length=0)[0], {k})


def test_drafts_must_promise_the_margin(lm, measured):
    promise = auto_draft_length.tokens_per_step([0.4], 2)
    for cost, k in ((promise / 1.09, 0), (promise / 1.11, 1)):
        auto_draft_length._chosen.clear()
        measured[1].update({0: 1.0, 1: cost, 2: 9.0, J: 9.0})
        assert auto_draft_length.choose(lm, shapes(2), PARAMS) == k


def test_the_heads_card_says_how_often_drafts_are_right(tiny_head, tmp_path, measured):
    model, params = tiny.make(DraftConfig(max_draft_length=J))
    measured[1].update({0: 1.0, 1: 1.3, 2: 1.5, J: 2.0})
    for name, acceptance, k in (("good", [0.9, 0.85, 0.8, 0.75], J), ("poor", [0.1, 0.02], 0)):
        folder = shutil.copytree(tiny_head, tmp_path / name)
        config = files.read_sealed(folder / "config.json") | {"acceptance": acceptance}
        (folder / "config.json").write_text(json.dumps(config))
        assert (
            auto_draft_length.choose(LanguageModel("tiny", model, params, Spelled(), str(folder)), shapes(4), PARAMS)
            == k
        )


def test_a_batch_is_measured_once_in_a_bucket(lm, measured):
    asked, costs = measured
    costs.update(COSTS[2])
    for prompts in (PROMPTS, [[7] * 9, [8] * 60, [9]], PROMPTS):
        run(lm, prompts)
    assert auto_draft_length.choose(lm, shapes(2), SamplingParams(seed=1)) == 2
    costs.update(COSTS[0])  # would a second timing disagree, a job sampled otherwise would still compile nothing
    assert auto_draft_length.choose(lm, shapes(2), SamplingParams(seed=2, temperature=0.9, top_k=3)) == 2
    assert [s[0].rows for s in asked] == [4, 2]
    assert {k: s.window for k, s in asked[0].items()} == {0: 1, 1: 2, 2: 3, J: J + 1}


def test_one_row_and_no_head_are_not_measured(lm, measured):
    assert auto_draft_length.choose(lm, shapes(1), PARAMS) == auto_draft_length.ONE_ROW
    assert auto_draft_length.choose(lm, shapes(1, window=2), PARAMS) == 1
    assert (
        auto_draft_length.choose(lm.without_drafter(), shapes(8), PARAMS)
        == auto_draft_length.choose(lm, shapes(8, window=1), PARAMS)
        == 0
    )
    assert not measured[0]


def test_plain_decoding_leaves_the_head_out_unless_the_window_is_fixed(lm, measured, monkeypatch):
    taken, run_batch = [], generation.run_batch
    monkeypatch.setattr(generation, "run_batch", lambda lm, *rest: taken.append(lm) or run_batch(lm, *rest))
    measured[1].update(COSTS[0])
    fixed = Shape(4, J + 1, 64, 96)
    answers = {str(run(lm, PROMPTS, **options)[0]) for options in ({}, {"draft_length": 0}, {"shape": fixed})}
    assert len(answers) == 1
    assert [one.model.drafter is None for one in taken] == [True, True, False]
    assert taken[0].params == {"target": lm.params["target"]}


@pytest.mark.slow
def test_bfloat16_is_bitwise_the_same_whatever_auto_takes_in_a_fixed_shape(measured):
    lm = LanguageModel("tiny", *tiny.make(DraftConfig(max_draft_length=J), dtype="bfloat16"), Spelled(), None)
    fixed = Shape(4, J + 1, 64, 96)
    expected, _ = run(lm, PROMPTS, draft_length=2, shape=fixed)
    for k in (0, J):
        auto_draft_length._chosen.clear()
        measured[1].update(COSTS[k])
        assert run(lm, PROMPTS, shape=fixed) == (expected, {k})


def test_it_times_the_programs_that_decode(lm, monkeypatch):
    """Every k once compiled is compiled for the job too, and the time counts as the summary's time to compile."""
    monkeypatch.setattr(auto_draft_length, "_chosen", {})
    events, clock = [], CompileClock()
    monkeypatch.setattr(
        auto_draft_length.jax.monitoring, "record_event_duration_secs", lambda *event: events.append(event)
    )
    of = lambda k: generation.job_shape([3, 1, 5], 12, batch_size=8, window=k + 1, context=lm.config.context)
    kind = SamplingParams(max_new_tokens=16)
    seconds = auto_draft_length.measure(lm, {k: of(k) for k in (0, 2)}, kind)
    assert set(seconds) == {0, 2} and all(s > 0 for s in seconds.values())
    before = decode.jit_run._cache_size()
    for k in (0, 2):
        run(lm, PROMPTS, draft_length=k)
    assert decode.jit_run._cache_size() == before
    [(name, duration)] = events
    counted = clock.seconds
    clock._listen(name, duration)
    assert counted < clock.seconds <= counted + duration


def test_what_is_compiled_within_something_else_counts_once(monkeypatch):
    clock, now = compile_clock.CompileClock(), [100.0]
    monkeypatch.setattr(compile_clock.time, "perf_counter", lambda: now[0])
    for at, event, duration in (
        (101, "/jax/core/compile/trace", 1.0),
        (103, "/jax/core/compile/trace", 1.0),
        (105, "/jax/core/compile/trace", 4.0),  # from 101 to 105, around the second
        (106, "/jax/other", 1.0),
        (107, "/jax/core/compile/backend", 1.0),
    ):
        now[0] = at
        clock._listen(event, duration)
    assert clock.seconds == 6.0
