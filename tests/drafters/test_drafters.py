"""The drafters behind one seam: the same tokens whoever drafts, and chains that are what each drafter says they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specformer_jax.config import DraftConfig, SamplingParams, Shape
from specformer_jax.decoding import decode, sampling
from specformer_jax.decoding.state import init_state
from specformer_jax.decoding.verify import Verdict
from specformer_jax.drafters.ngram import LONGEST, REPEATED, WithLookup, lookup
from specformer_jax.errors import UserError
from tests import tiny
from tests.decoding import test_decode

OTHERS = ("medusa", "eagle", "ngram")


def make(drafter: str):
    """A random drafter on the target that `test_decode` has answers of."""
    model, params = tiny.make(DraftConfig(max_draft_length=5, drafter=drafter))
    return model, params | {"target": tiny.make(test_decode.HEAD)[1]["target"]}


@pytest.fixture(scope="module")
def plain():
    model, params = tiny.make(test_decode.HEAD)
    pairs = zip(test_decode.PROMPTS, test_decode.REQUESTS, strict=True)
    return [tiny.naive(model, params, prompt, request) for prompt, request in pairs]


@pytest.mark.parametrize("k", [pytest.param(k, marks=pytest.mark.slow) for k in (0, 1, 3)] + [5])
@pytest.mark.parametrize("drafter", OTHERS)
def test_same_tokens_whoever_drafts(plain, drafter, k):
    model, params = make(drafter)
    got, state = tiny.answers(model, params, test_decode.PROMPTS, test_decode.REQUESTS, k=k)
    assert got == plain
    assert int(state.accepted.sum()) > 0 or k == 0, "no draft was ever right: the test proves nothing"


def test_lookup_by_the_definition():
    """Against a search written the naive way, on random text over few letters."""
    random = np.random.default_rng(0)
    for _ in range(60):
        text = random.integers(0, 4, random.integers(1, 14)).tolist()
        for shortest in (1, REPEATED):
            assert found(text, 4, shortest) == naive(text, 4, shortest), text


def found(text: list[int], count: int, shortest: int) -> list[int]:
    history = np.full(20, 9, np.int32)  # what lies past the newest token must not be read
    history[: len(text) - 1] = text[:-1]
    find = jax.jit(lookup, static_argnames=("count", "shortest"))
    end, token = jnp.int32(len(text) - 1), jnp.int32(text[-1])
    return find(jnp.asarray(history), end, token, count=count, shortest=shortest).tolist()


def naive(text: list[int], count: int, shortest: int) -> list[int]:
    for length in range(LONGEST, shortest - 1, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if len(text) > length and text[end - length : end] == text[-length:]:
                ahead = list(text)
                for i in range(count):
                    ahead.append(ahead[end + i])
                return ahead[len(text) :]
    return [-1] * count


def with_lookup(model):
    return dataclasses.replace(model, drafter=WithLookup.around(model.drafter))


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("together", [False, True])
def test_same_tokens_with_lookup_beside_a_head(plain, k, together):
    """Rows of a batch, and each alone, where a row whose drafts are found does not run the head."""
    model, params = tiny.make(test_decode.HEAD)
    jobs = list(zip(test_decode.PROMPTS, test_decode.REQUESTS, strict=True))
    batches = [jobs] if together else [[job] for job in jobs]
    got = [tiny.answers(with_lookup(model), params, *zip(*batch, strict=True), k=k)[0] for batch in batches]
    assert [answer for answers in got for answer in answers] == plain


@pytest.mark.parametrize("rows", [1, 2])
def test_lookup_drafts_where_the_text_repeats_and_the_head_elsewhere(rows):
    """The chains of one target pass over two texts, the second of which ends as it went on before."""
    model, params = tiny.make(DraftConfig(max_draft_length=4))
    texts = jnp.array([[5, 6, 7, 8, 9, 10, 11, 4, 1], [5, 6, 7, 8, 9, 10, 5, 6, 7]])
    copied = [8, 9, 10, 5]
    expected = chains(model, params, texts)
    assert expected[1] != copied, "the head says it too: the test proves nothing"
    expected[1] = copied
    pairs = [texts] if rows == 2 else [texts[:1], texts[1:]]
    assert [chain for pair in pairs for chain in chains(with_lookup(model), params, pair)] == expected


def chains(model, params, texts) -> list[list[int]]:
    """The drafts after each text whose last token the target has just chosen."""
    rows = sampling.stack([SamplingParams()] * len(texts))
    state = init_state(model, Shape(len(texts), 5, 8, 32), rows, jnp.full(len(texts), 9), 9)
    start, tokens = jnp.zeros(len(texts), jnp.int32), texts[:, :-1]
    out = model.read(params, tokens, start, state.cache)
    last = jnp.full(len(texts), tokens.shape[1] - 1)
    verdict = Verdict(last, texts[:, -1], texts[:, 1:])
    drafts, _ = decode.draft(model, params, out.hooks, tokens, verdict, start, out.cache, state, draft_length=4)
    return drafts.tolist()


def test_unknown_drafters_are_named():
    with pytest.raises(UserError, match="unknown drafter 'hydra': it must be one of specformer, medusa"):
        DraftConfig(drafter="hydra").bind(tiny.CONFIG)
