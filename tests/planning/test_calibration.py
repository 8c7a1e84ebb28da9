"""What confidence is worth, learned from outcomes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specformer_jax.planning.calibration import MEMORY, Calibration

BINS = 16
MIDDLE = (np.arange(BINS) + 0.5) / BINS


def outcomes(random, slots, truth, drafts):
    """Outcomes of a call: so many drafts of each slot at confidences all over, right as often as `truth` says."""
    bins = random.integers(0, BINS, (slots, drafts))
    right = random.random((slots, drafts)) < truth(MIDDLE[bins])
    counts = np.zeros((slots, BINS, 2), np.int32)
    for slot in range(slots):
        np.add.at(counts[slot], (bins[slot], 0), 1)
        np.add.at(counts[slot], (bins[slot], 1), right[slot])
    return counts


def chances(calibration):
    """The chance of slot 0 in the middle of each bin."""
    return calibration.survival(np.tile(MIDDLE[:, None], (1, len(calibration.line))))[:, 0]


def curve(slope, offset):
    return lambda confidence: 1 / (1 + np.exp(-(slope * np.log(confidence / (1 - confidence)) + offset)))


def test_confidence_is_taken_as_it_is_before_anything_is_seen():
    found = Calibration(2, BINS).survival(np.array([[0.9, 0.5], [0.0, 1.0]]))
    assert found[0] == pytest.approx([0.9, 0.45]) and found[1, 0] < 1e-3


@pytest.mark.parametrize("slope, offset", [(1.0, 0.0), (0.5, -1.0), (1.8, 0.7), (0.3, 1.5)])
def test_a_few_thousand_outcomes_make_the_expected_calibration_error_small(slope, offset):
    random, calibration, truth = np.random.default_rng(0), Calibration(2, BINS), curve(slope, offset)
    for _ in range(300):
        calibration.observe(outcomes(random, 2, truth, 10))
    assert np.abs(chances(calibration) - truth(MIDDLE)).mean() < 0.03
    assert calibration.line[:, 0] == pytest.approx([slope] * 2, abs=0.25)


@pytest.mark.parametrize("at_once", [1, 40, 400, 4000])
@pytest.mark.parametrize("claimed, true", [(0.97, 0.5), (0.03, 0.5), (0.97, 0.02), (0.5, 0.98)])
def test_a_drafter_that_is_always_as_sure_is_taken_for_what_it_is_worth(at_once, claimed, true):
    """However many outcomes come at once: a step of Newton's from a line that is far off goes too far."""
    random, calibration, counts = np.random.default_rng(0), Calibration(1, BINS), np.zeros((1, BINS, 2), int)
    for _ in range(max(5, 8000 // at_once)):
        counts[0, int(claimed * BINS)] = at_once, random.binomial(at_once, true)
        calibration.observe(counts)
    assert calibration.survival(np.array([[claimed]]))[0, 0] == pytest.approx(true, abs=0.04)


def test_what_was_true_once_is_forgotten():
    random, calibration = np.random.default_rng(0), Calibration(1, BINS)
    for truth in (curve(1, 2), curve(1, -2)):
        for _ in range(int(4 * MEMORY / 100)):
            calibration.observe(outcomes(random, 1, truth, 100))
        assert np.abs(chances(calibration) - truth(MIDDLE)).mean() < 0.04


def test_a_slot_that_was_not_read_keeps_its_line():
    random, calibration = np.random.default_rng(0), Calibration(2, BINS)
    calibration.observe(outcomes(random, 2, curve(1, -2), 2000))
    before = calibration.line.copy()
    for _ in range(50):
        counts = outcomes(random, 2, curve(1, 2), 500)
        counts[1] = 0
        calibration.observe(counts)
    assert (calibration.line[1] == before[1]).all() and (calibration.line[0] != before[0]).any()


@settings(max_examples=100, deadline=None)
@given(calls=st.lists(st.tuples(st.integers(0, BINS - 1), st.integers(0, 300), st.floats(0, 1)), max_size=20))
def test_few_or_one_sided_outcomes_leave_a_line_that_is_a_line(calls):
    calibration = Calibration(1, BINS)
    for where, tried, share in calls:
        counts = np.zeros((1, BINS, 2), np.int32)
        counts[0, where] = tried, int(share * tried)
        calibration.observe(counts)
    found = chances(calibration)
    assert np.isfinite(calibration.line).all()
    assert (found > 0).all() and (found < 1).all() and (np.diff(found) >= 0).all()


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("where", [0, 7, BINS - 1])
def test_drafts_that_are_always_right_or_never_are_expected_to_go_on_so(right, where):
    calibration = Calibration(1, BINS)
    for _ in range(100):
        counts = np.zeros((1, BINS, 2), np.int32)
        counts[0, where] = 20, 20 * right
        calibration.observe(counts)
    assert abs(chances(calibration)[where] - right) < 0.05


def test_one_outcome_moves_little():
    calibration = Calibration(1, BINS)
    before = chances(calibration)
    counts = np.zeros((1, BINS, 2), np.int32)
    counts[0, 12] = 1, 0
    calibration.observe(counts)
    assert np.abs(chances(calibration) - before).max() < 0.1


def test_there_may_be_no_drafts_at_all():
    calibration = Calibration(0, BINS)
    calibration.observe(np.zeros((0, BINS, 2), np.int32))
    assert calibration.line.shape == (0, 2) and calibration.survival(np.zeros((3, 0))).shape == (3, 0)
