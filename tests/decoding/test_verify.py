"""The verifier samples exactly as plain sampling would: frequencies against the processed softmax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pallas_kernels import Places
from specformer_jax.config import SamplingParams, Shape
from specformer_jax.decoding import sampling
from specformer_jax.decoding.flat import Flat
from specformer_jax.decoding.model import Model
from specformer_jax.decoding.state import BROKEN, init_state
from specformer_jax.decoding.verify import Verdict, verify
from specformer_jax.errors import UserError
from specformer_jax.nn.target import Target
from tests import tiny

V, W, REPEATS = 11, 4, 6000
REQUESTS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6, top_k=3),
    SamplingParams(temperature=1.4, top_p=0.7),
    SamplingParams(temperature=1.0, min_p=0.2),
    SamplingParams(temperature=0.8, top_k=6, top_p=0.85, min_p=0.05),
    SamplingParams(temperature=0.0, top_k=2, top_p=0.5),
]


@pytest.fixture(scope="module")
def batch():
    """One mixed batch: every request REPEATS times with its own seed, the likeliest tokens as drafts, one verdict."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(REQUESTS), W, V)).astype(np.float32) * 1.5
    rows = [dataclasses.replace(r, seed=int(s)) for r in REQUESTS for s in rng.integers(0, 2**32, REPEATS)]
    hidden = np.repeat(logits, REPEATS, axis=0)
    drafts = np.argsort(-hidden, axis=-1)[:, : W - 1, 0].astype(np.int32)  # the greedy chain
    lengths = np.repeat(np.arange(len(REQUESTS), dtype=np.int32) * 7, REPEATS)
    verdict = jax.jit(judge)(hidden, drafts, lengths, sampling.stack(rows))
    return logits, drafts, jax.tree.map(np.asarray, verdict)


def judge(hidden, drafts, lengths, rows, truncation=True) -> Verdict:
    """The verdict on a flat batch of every row's last token, at position lengths[b], and its drafts behind it."""
    B = len(hidden)
    numbers, window = jnp.arange(B, dtype=jnp.int32), jnp.arange(W, dtype=jnp.int32)
    places = Places(jnp.repeat(numbers, W), (lengths[:, None] + window).reshape(-1), jnp.zeros((B, 1), jnp.int32), W)
    tokens = jnp.pad(drafts, ((0, 0), (1, 0))).reshape(-1)
    ones = jnp.ones(B, jnp.int32)
    flat = Flat(places, tokens, numbers, numbers * W, ones * (W - 1), ones == 1, ones)
    state = init_state(Model(Target(tiny.CONFIG)), Shape(B, W, 1, 64), rows, pages=1)
    return verify(jnp.asarray(hidden).reshape(-1, V), flat, state, jnp.eye(V), truncation=truncation)


def processed_softmax(logits: np.ndarray, request: SamplingParams) -> np.ndarray:
    """What plain sampling draws from, by definition."""
    logits = logits.astype(np.float64)
    if request.temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    weight = np.exp((logits - logits.max()) / request.temperature) * tiny.keep(logits, request)
    return weight / weight.sum()


def p_value(tokens: np.ndarray, expected: np.ndarray) -> float:
    """Of the chi-square test that the tokens were drawn from `expected`."""
    counts = np.bincount(tokens, minlength=len(expected))
    assert counts[expected == 0].sum() == 0, "a token was sampled that the processors rule out"
    possible = expected > 0
    if possible.sum() == 1:
        return 1.0
    return stats.chisquare(counts[possible], expected[possible] * counts.sum()).pvalue


@pytest.mark.parametrize("i", range(len(REQUESTS)))
def test_committed_tokens_follow_the_processed_softmax(batch, i):
    """Every token that a step commits: the first always, the next ones given that the drafts before were accepted."""
    logits, _, verdict = batch
    rows = slice(i * REPEATS, (i + 1) * REPEATS)
    for position in range(W):
        committed = verdict.accepted[rows] >= position
        tokens = verdict.tokens[rows, position][committed]
        if len(tokens) >= 200:
            # 24 tests in all: a true hypothesis fails one of them about once in 40 thousand runs; seeds are fixed.
            assert p_value(tokens, processed_softmax(logits[i, position], REQUESTS[i])) > 1e-6


@pytest.mark.parametrize("i", range(len(REQUESTS)))
def test_acceptance_rate_is_the_drafts_probability(batch, i):
    logits, drafts, verdict = batch
    rows = slice(i * REPEATS, (i + 1) * REPEATS)
    probability = processed_softmax(logits[i, 0], REQUESTS[i])[drafts[i * REPEATS, 0]]
    accepted = (verdict.accepted[rows] >= 1).mean()
    assert abs(accepted - probability) < 5 * np.sqrt(0.25 / REPEATS)


def test_the_next_token_is_the_targets_own(batch):
    _, drafts, verdict = batch
    index = np.arange(len(drafts))
    assert np.array_equal(verdict.token, verdict.tokens[index, verdict.accepted])
    wrong = verdict.accepted < W - 1
    assert (verdict.token[wrong] != drafts[index[wrong], verdict.accepted[wrong]]).all()


def test_a_temperature_too_small_to_divide_by_is_greedy():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, W, V)) * 9, jnp.float32)
    rows = sampling.stack([SamplingParams(temperature=2e-38, seed=5), SamplingParams(temperature=1e-4, seed=5)])
    verdict = judge(logits, jnp.full((2, W - 1), -1), jnp.array([3, 9]), rows)
    np.testing.assert_array_equal(verdict.tokens, logits.argmax(-1))


@pytest.mark.parametrize(("value", "truncation"), [(jnp.nan, True), (-jnp.inf, False)])
def test_a_hidden_state_that_is_not_finite_has_no_token(value, truncation):
    """No draft is right there, and the other rows are as they were."""
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(3, W, V)), jnp.float32)
    rows = sampling.stack([SamplingParams(temperature=t, seed=5) for t in (0.0, 1.0, 0.0)])
    lengths = jnp.array([3, 9, 4])
    whole = judge(logits, jnp.full((3, W - 1), -1), lengths, rows, truncation)
    drafts = whole.tokens[:, : W - 1]  # all right
    broken = judge(logits.at[1, 1, 4].set(value), drafts, lengths, rows, truncation)
    assert broken.accepted.tolist() == [W - 1, 1, W - 1]
    assert broken.tokens[1, 1] == broken.token[1] == BROKEN
    np.testing.assert_array_equal(broken.tokens[jnp.array([0, 2])], whole.tokens[jnp.array([0, 2])])
    assert broken.tokens[1, 0] == whole.tokens[1, 0]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"temperature": -1.0}, "temperature -1.0 must be within"),
        ({"temperature": np.inf}, "temperature inf must be within"),
        ({"top_p": 0.0}, "top-p 0.0 must be above 0"),
        ({"top_k": -1}, "top-k -1 must be within"),
        ({"top_k": 2**31}, "top-k 2147483648 must be within"),
        ({"min_p": 2.0}, "min-p 2.0 must be within"),
        ({"seed": 2**32}, "seed 4294967296 must be within"),
        ({"max_new_tokens": 0}, "max-new-tokens 0 must be within"),
        ({"max_new_tokens": 2**31}, "max-new-tokens 2147483648 must be within"),
    ],
)
def test_impossible_requests_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**wrong)
