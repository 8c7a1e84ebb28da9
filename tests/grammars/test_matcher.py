"""Which tokens a grammar allows along a chain of drafts, before and behind what a model thinks."""

import numpy as np
import pytest

from specformer_jax.grammars.matcher import Matchers, Thoughts
from tests.grammars.automata import AUTOMATA, END

BEGIN, CLOSE = 11, 12
PAIRS = AUTOMATA[0]  # (ab|c)*e
A, B, C, E = (ord(letter) - ord("a") for letter in "abce")


@pytest.fixture
def matchers(lm):
    return Matchers(lm)


def allowed(bits):
    return [token for token in range(13) if int(bits[0]) >> token & 1]


def test_masks_follow_the_drafts_and_leave_the_answer_where_it_is(matchers):
    matcher = matchers.of(PAIRS.grammar)
    for _ in range(2):  # looking ahead changes nothing
        drafts, bits = matcher.check([C, A, -1, E], 4)
        assert drafts == [C, A, B, E], "what is forced stands where nothing is proposed"
        assert [allowed(each) for each in bits] == [PAIRS.allowed(drafts[:i]) for i in range(5)]
    drafts, bits = matcher.check([B, A], 4)
    assert drafts == [] and allowed(bits[0]) == PAIRS.allowed([])
    matcher.take([C, E])
    assert matcher.check([A], 4).drafts == [END]
    with pytest.raises(RuntimeError, match="cannot be followed any further"):
        matcher.take([A])


def test_what_is_forced_may_stay_undrafted(lm):
    """Then only what is proposed is drafted, as far as it is allowed."""
    matcher = Matchers(lm, forces=False).of(PAIRS.grammar)
    drafts, bits = matcher.check([C, A, -1, E], 4)
    assert drafts == [C, A] and [allowed(each) for each in bits] == [PAIRS.allowed(drafts[:i]) for i in range(3)]
    assert matcher.check([B, A], 4).drafts == []


def test_thoughts_follow_no_grammar(matchers):
    inside = matchers.of(PAIRS.grammar, Thoughts(BEGIN, CLOSE, begun=True))
    drafts, bits = inside.check([B, CLOSE, A, -1], 4)
    assert drafts == [B, CLOSE, A, B]
    expected = [list(range(13))] * 2 + [PAIRS.allowed([]), PAIRS.allowed([A]), PAIRS.allowed([A, B])]
    assert [allowed(each) for each in bits] == expected
    assert inside.check([B, -1], 4).drafts == [B], "still within them: the chain was only looked at"
    inside.take([B, E, CLOSE, C])
    assert allowed(inside.check([], 4).bits[0]) == PAIRS.allowed([C])


def test_a_model_may_think_or_not(matchers):
    thoughts = Thoughts(BEGIN, CLOSE, begun=False)
    matcher = matchers.of(PAIRS.grammar, thoughts)
    assert allowed(matcher.check([], 4).bits[0]) == sorted([*PAIRS.allowed([]), BEGIN])
    matcher.take([BEGIN, B])
    assert len(allowed(matcher.check([], 4).bits[0])) == 13
    silent = matchers.of(PAIRS.grammar, thoughts)
    silent.take([C])
    assert allowed(silent.check([], 4).bits[0]) == PAIRS.allowed([C]), "it begins no thought within its answer"


def test_no_drafts_are_looked_at_where_none_may_be(matchers):
    drafts, bits = matchers.of(PAIRS.grammar).check([C, C], 0)
    assert drafts == [] and np.shape(bits) == (1, 1)
