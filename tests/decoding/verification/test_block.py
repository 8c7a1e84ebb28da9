"""Block verification keeps the target's distribution: summed over all that can happen, and in a million draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specformer_jax.decoding.verification.block import block_chances, judge_block, verify_block
from tests.decoding.verification import trees

SIZES = [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)]
DRAWS = 1_000_000
DRAWN = SIZES[2], SIZES[4], SIZES[5]
P_VALUE = 1e-3 / len(DRAWN)
chances_of_all = jax.jit(jax.vmap(block_chances))
judge_all = jax.jit(jax.vmap(judge_block))


def outcomes(tree: trees.Tree, count_of=None) -> tuple[trees.Law, float]:
    """The law of k + 1 tokens, those committed and then plain decoding's, and how many drafts are accepted in the mean.

    Args:
      count_of: chain -> how many of its drafts are verified; None takes all.
    """
    chains = list(tree.chains())
    k = tree.depth
    counts = np.array([k if count_of is None else count_of(chain) for chain in chains])
    draft, target = (np.stack(rows) for rows in zip(*map(tree.along, chains), strict=True))
    chance = np.asarray(chances_of_all(draft, target, np.array(chains), counts).chance, np.float64)
    law: trees.Law = {}
    mean = 0.0
    for end in range(k + 1):
        # u of 2 is above every h, u of 0 below: the chain ends here.
        uniforms = np.where(np.arange(1, k + 1) == end, 0.0, 2.0).astype(np.float32)
        accepted, rest = judge_all(draft, target, np.array(chains), counts, np.tile(uniforms, (len(chains), 1)))
        for i, chain in enumerate(chains):
            mass = tree.drafted(chain) * (chance[i, end] if end else 1.0) * np.prod(1 - chance[i, end + 1 :])
            if mass > 0:
                assert accepted[i] == end
                mean += mass * end
                for token in range(tree.vocabulary):
                    tree.complete(law, (*chain[:end], token), mass * float(rest[i, token]))
    return law, mean


@pytest.mark.parametrize(("vocabulary", "depth"), SIZES)
def test_the_distribution_is_the_targets(vocabulary, depth):
    for seed, apart in enumerate((1.0, 0.3, 0.0)):
        tree = trees.make(np.random.default_rng(seed), vocabulary, depth, apart=apart)
        law, mean = outcomes(tree)
        assert trees.differ(law, tree.law()) < 2e-6
        assert mean == pytest.approx(depth, abs=1e-5) or apart > 0, "a drafter that is the target is always right"


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), stops=st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_a_chain_may_end_where_the_drafts_before_say(seed, stops):
    """How many drafts are read may hang on the first of them, as a budget shared out by confidence has it."""
    tree = trees.make(np.random.default_rng(seed), 3, 2)
    law, _ = outcomes(tree, lambda chain: min(stops[3], 1 + stops[chain[0]]))
    assert trees.differ(law, tree.law()) < 2e-6


def test_a_chain_that_ends_by_a_later_draft_would_not_keep_it():
    tree = trees.make(np.random.default_rng(2), 3, 2)
    law, _ = outcomes(tree, lambda chain: 1 + (chain[1] == 0))
    assert trees.differ(law, tree.law()) > 1e-3


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), vocabulary=st.integers(2, 3), depth=st.integers(1, 3))
def test_it_accepts_at_least_what_token_verification_does(seed, vocabulary, depth):
    """In the mean; the chance that i drafts or more are accepted is p_i, and for k = 1 the two are the same."""
    tree = trees.make(np.random.default_rng(seed), vocabulary, depth, apart=0.6)
    by_token = by_block = 0.0
    for chain in tree.chains():
        weight, passed = 1.0, 1.0
        for d in range(depth):
            drawn, wanted = tree.draft[d][chain[: d + 1]], tree.target[d][chain[: d + 1]]
            if drawn == 0:
                break
            weight, passed = min(weight * wanted / drawn, 1.0), passed * min(wanted / drawn, 1.0)
            by_token, by_block = by_token + tree.drafted(chain) * passed, by_block + tree.drafted(chain) * weight
    _, mean = outcomes(tree)
    assert mean == pytest.approx(by_block, abs=1e-5)
    assert by_block >= by_token - 1e-9 if depth > 1 else by_block == pytest.approx(by_token, abs=1e-9)


def test_a_certain_draft_is_accepted_as_the_target_says():
    """One-hot drafts, as a lookup makes them: each is accepted with the target's own probability."""
    tree = trees.make(np.random.default_rng(4), 3, 2)
    certain = trees.Tree([np.broadcast_to(np.eye(3)[1], table.shape) for table in tree.draft], tree.target)
    law, mean = outcomes(certain)
    assert trees.differ(law, tree.law()) < 2e-6
    assert mean == pytest.approx(tree.wanted((1,)) + tree.wanted((1, 1)), abs=1e-6)


def test_greedy_rows_accept_the_longest_right_prefix():
    target = np.eye(4, dtype=np.float32)[[2, 0, 1, 3]]
    noise = np.random.default_rng(0).gumbel(size=4).astype(np.float32)
    for tokens, accepted, token in (([2, 0, 1], 3, 3), ([2, 1, 1], 1, 0), ([0, 0, 1], 0, 2)):
        for u in (1e-7, 1.0):
            draft, uniforms = np.eye(4, dtype=np.float32)[tokens], np.full(3, u, np.float32)
            found = jax.jit(verify_block)(draft, target, np.array(tokens), 3, uniforms, noise)
            assert (int(found.accepted), int(found.token)) == (accepted, token)


@pytest.mark.parametrize(("vocabulary", "depth"), DRAWN)
def test_a_million_draws_are_the_targets(vocabulary, depth):
    tree = trees.make(np.random.default_rng(7), vocabulary, depth, apart=0.7)
    rng = np.random.default_rng(1)
    begin = np.array(list(tree.chains()), np.int32)
    draft, target = (np.stack(rows) for rows in zip(*(tree.along(tuple(c)) for c in begin), strict=True))
    which = rng.choice(len(begin), DRAWS, p=[tree.drafted(tuple(chain)) for chain in begin])

    @jax.jit
    @jax.vmap
    def verify(which, uniforms, noise):
        return verify_block(*(jnp.asarray(x)[which] for x in (draft, target, begin)), depth, uniforms, noise)

    uniforms = rng.random((DRAWS, depth), np.float32)
    noise = rng.gumbel(size=(DRAWS, vocabulary)).astype(np.float32)
    found = jax.tree.map(np.asarray, verify(which, uniforms, noise))
    counts = trees.count(tree, rng, begin[which], found.accepted, found.token)
    assert trees.p_value(counts, np.array(list(tree.law().values()))) > P_VALUE
