"""Bias, penalties, bad words: as the plain definition has them, at every place of a chain, whoever else is there."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from specformer_jax.config import DraftConfig, SamplingParams, Shape
from specformer_jax.decoding import decode, processors, sampling
from specformer_jax.decoding.processors import Bias
from specformer_jax.errors import UserError
from tests import tiny
from tests.decoding import by_hand
from tests.decoding.test_decode import PROMPTS, check_draft_length

HEAD = DraftConfig(max_draft_length=5)
GREEDY = SamplingParams(max_new_tokens=24)
ENDLESS = ((3, -100.0),)
REQUESTS = [
    dataclasses.replace(GREEDY, repetition_penalty=1.4, logit_bias=ENDLESS),
    SamplingParams(1.0, seed=1, max_new_tokens=24, frequency_penalty=0.3, presence_penalty=0.8, logit_bias=ENDLESS),
    SamplingParams(0.7, 5, 0.9, seed=2, max_new_tokens=24, repetition_penalty=0.8, logit_bias=((5, 1.5), *ENDLESS)),
    dataclasses.replace(GREEDY, frequency_penalty=-0.4),
]
REQUESTS[2:] = [
    dataclasses.replace(REQUESTS[2], bad_words=((6, 12), (1, 1), (8, 12, 5))),
    # The answer begins with 4, which only the prompt makes a 5 and a 4.
    dataclasses.replace(REQUESTS[3], bad_words=((5, 4), (8, 12), (12, 12, 12), tuple(range(13)))),
]


@pytest.fixture(scope="module")
def plain():
    """The answers of naive decoding."""
    model, params = tiny.make(HEAD)
    return [tiny.naive(model, params, p, r) for p, r in zip(PROMPTS, REQUESTS, strict=True)]


def test_the_answers_are_worth_comparing(plain):
    model, params = tiny.make(HEAD)
    for prompt, request, answer in zip(PROMPTS, REQUESTS, plain, strict=True):
        without = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
        assert tiny.naive(model, params, prompt, dataclasses.replace(request, **without)) != answer


@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_same_tokens_at_every_draft_length(plain, k):
    check_draft_length(plain, REQUESTS, k)


@pytest.mark.parametrize("size", [4, 7, 11, 24])
def test_same_tokens_at_every_budget(plain, size):
    model, params = tiny.make(HEAD)
    prompts, lengths = jnp.asarray([[*p, *[0] * (18 - len(p))] for p in PROMPTS]), jnp.array([len(p) for p in PROMPTS])
    state = decode.jit_start(
        model, params, prompts, lengths, sampling.stack(REQUESTS), jnp.full(4, 24), shape=Shape(4, 4, 8, 96),
        max_new_tokens=24, draft_length=3,
    )  # fmt: skip
    state = decode.jit_run(model, params, state, jnp.int32(24), size=size)
    assert [by_hand.answer(state, row) for row in range(4)] == plain


def test_bad_words_are_never_said(plain):
    model, params = tiny.make(HEAD)
    for prompt, request, answer in zip(PROMPTS[2:], REQUESTS[2:], plain[2:], strict=True):
        free = tiny.naive(model, params, prompt, dataclasses.replace(request, bad_words=()))
        said, free_said = (" ".join(map(str, ["", *ids, ""])) for ids in (answer, free))
        words = [" ".join(map(str, ["", *word, ""])) for word in request.bad_words]
        assert any(word in free_said for word in words) and not any(word in said for word in words)
    assert (*PROMPTS[3], *plain[3])[17:19] == (5, 4)


def test_they_need_no_truncation(plain):
    model, params = tiny.make(HEAD, truncation=False)
    chosen = [0, 1, 3]
    got, _ = tiny.answers(model, params, [PROMPTS[i] for i in chosen], [REQUESTS[i] for i in chosen], k=3)
    assert got == [plain[i] for i in chosen]


def test_who_asks_for_nothing_gets_what_is_there_without_others():
    model, params = tiny.make(HEAD)
    request = SamplingParams(1.3, seed=4, max_new_tokens=24)
    got, _ = tiny.answers(model, params, PROMPTS[:2], [REQUESTS[0], request], k=3)
    assert got[1] == tiny.naive(model, params, PROMPTS[1], request)


def test_what_is_done_to_logits_stops_where_it_says():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 11)), jnp.float32)
    ruled_out = [Bias(4, -math.inf, until=7), Bias(10**6, 1.0)]
    rows = processors.stack([SamplingParams(), SamplingParams(logit_bias=((4, 2.0),)), SamplingParams()], ruled_out)
    before = processors.Before(jnp.full((3, 2), processors.NO_TOKEN), jnp.ones((3, 2), bool), jnp.full((3, 15), -1))
    got = np.asarray(processors.process(logits, rows, jnp.array([6, 6, 7]), lambda: before))
    assert got[0, 4] == got[1, 4] == -np.inf and got[2, 4] == logits[2, 4]
    np.testing.assert_array_equal(np.delete(got, 4, axis=1), np.delete(np.asarray(logits), 4, axis=1))


@pytest.mark.parity
def test_the_definition_is_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, 13, rng.integers(2, 20)).tolist()
        bias = tuple((int(t), float(b)) for t, b in zip(rng.permutation(13)[:3], rng.normal(size=3) * 3, strict=True))
        request = SamplingParams(repetition_penalty=float(rng.uniform(0.5, 2)), logit_bias=bias)
        logits = rng.normal(size=13)
        scores = torch.tensor(logits[None])
        for processor in (
            transformers.SequenceBiasLogitsProcessor({(token,): amount for token, amount in bias}),
            transformers.RepetitionPenaltyLogitsProcessor(request.repetition_penalty),
        ):
            scores = processor(torch.tensor([ids]), scores)
        np.testing.assert_allclose(tiny.processed(logits, request, ids[:1], ids[1:]), scores[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((1, math.nan),)},
        {"logit_bias": tuple((i, 1.0) for i in range(301))},
    ],
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(UserError):
        SamplingParams(**fields)
