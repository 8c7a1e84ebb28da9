"""FLy lets a wrong draft pass where the target was unsure and agrees with what follows, and nowhere else."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specformer_jax.config import DraftConfig, SamplingParams
from specformer_jax.decoding.verification.fly import COUNTED, entropy_of_likeliest, loosely_accepted
from specformer_jax.decoding.verification.kind import FLY, Verification
from specformer_jax.errors import UserError
from tests import tiny
from tests.decoding import test_decode


@pytest.mark.parametrize(
    ("right", "entropy", "window", "accepted"),
    [
        ("0111", "1000", 3, 4),  # unsure, and three right ones behind it
        ("0111", "0111", 3, 0),  # the target was sure
        ("0101", "1111", 2, 0),  # another wrong one too soon
        ("1011", "1111", 2, 4),
        ("1011", "1111", 3, 1),  # only two drafts are behind it
        ("1101", "1111", 1, 4),
        ("1110", "1111", 1, 3),  # nothing is behind the last one
        ("0110", "1111", 2, 3),
        ("1111", "0000", 6, 4),
        ("0111", "1111", 6, 4),  # a window longer than the chain is all that is behind the first draft
        ("0", "1", 6, 0),
    ],
)
def test_by_hand(right, entropy, window, accepted):
    bits = lambda word: np.array([[bit == "1" for bit in word]])
    judge = jax.jit(functools.partial(loosely_accepted, window=window, least=0.5))
    assert judge(bits(right), bits(entropy).astype(np.float32), np.array([len(right)])) == accepted


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("window", [1, 2, 6])
def test_as_the_rule_says_it(k, window):
    """Every chain that can be, as many drafts of it read as can be."""
    bits = list(itertools.product([False, True], repeat=k))
    cases = [(right, sure, count) for right in bits for sure in bits for count in range(k + 1)]
    needed, expected = min(window, k - 1), []
    for right, sure, count in cases:
        accepted = 0
        for i in range(count):
            behind = right[i + 1 : min(i + 1 + needed, count)]
            if not right[i] and (sure[i] or needed < 1 or len(behind) < needed or not all(behind)):
                break
            accepted += 1
        expected.append(accepted)
    right, sure, count = map(np.array, zip(*cases, strict=True))
    entropy = np.where(sure, 0.1, 0.9).astype(np.float32)
    found = jax.jit(functools.partial(loosely_accepted, window=window, least=0.5))(right, entropy, count)
    assert found.tolist() == expected


def test_entropy_counts_the_likeliest_tokens():
    p = np.random.default_rng(0).dirichlet(np.ones(7), size=5).astype(np.float32)
    best = np.sort(p, axis=1)[:, -COUNTED:].astype(np.float64)
    np.testing.assert_allclose(entropy_of_likeliest(jnp.asarray(p)), -(best * np.log(best)).sum(axis=1), rtol=1e-5)
    assert entropy_of_likeliest(jnp.eye(2)).tolist() == [0, 0]


def test_a_model_that_is_never_unsure_enough_answers_exactly_and_one_that_is_accepts_more():
    head = DraftConfig(max_draft_length=4)
    of_prompt = [{"seed": 1}, {"temperature": 0.7, "top_k": 8}, {"temperature": 1.0}, {"temperature": 1.3}]
    requests = [SamplingParams(**{"seed": i, "max_new_tokens": 40, **of_prompt[i % 4]}) for i in range(16)]
    found = {}
    for least in (None, 5.0, 0.0):
        verification = Verification() if least is None else Verification(FLY, fly_window=1, fly_entropy=least)
        model, params = tiny.make(head, verification=verification)
        found[least] = tiny.answers(model, params, test_decode.PROMPTS * 4, requests, k=4)
    assert found[5.0][0] == found[None][0]
    assert found[0.0][0] != found[None][0], "no wrong draft passed: the test proves nothing"
    loose = found[0.0][1]
    assert np.array_equal(loose.known - loose.prompt, 1 + loose.steps + loose.accepted.sum(axis=1))
    rate = lambda state: float(state.accepted.sum() / state.steps.sum())
    assert rate(loose) > rate(found[None][1])


def test_it_says_that_it_is_lossy():
    assert "lossy" in FLY and Verification(FLY).promise.startswith("LOSSY")
    assert Verification().fly_window == 6 and Verification().fly_entropy == 0.3, "the paper's"
    for wrong in ({"fly_window": 0}, {"fly_entropy": -1.0}, {"fly_entropy": float("nan")}):
        with pytest.raises(UserError, match="fly-"):
            dataclasses.replace(Verification(FLY), **wrong)
