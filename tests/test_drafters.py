"""The drafters behind one seam: the same tokens whoever drafts, and chains that are what each drafter says they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_decode
import tiny

from specformer_jax.config import DraftConfig, UserError
from specformer_jax.drafters.ngram import lookup

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
        assert found(text, 4) == naive(text, 4), text


def found(text: list[int], count: int) -> list[int]:
    history = np.full(20, 9, np.int32)  # what lies past the newest token must not be read
    history[: len(text) - 1] = text[:-1]
    find = jax.jit(lookup, static_argnames="count")
    return find(jnp.asarray(history), jnp.int32(len(text) - 1), jnp.int32(text[-1]), count=count).tolist()


def naive(text: list[int], count: int) -> list[int]:
    for length in (3, 2, 1):
        for end in range(len(text) - 1, length - 1, -1):
            if len(text) > length and text[end - length : end] == text[-length:]:
                ahead = list(text)
                for i in range(count):
                    ahead.append(ahead[end + i])
                return ahead[len(text) :]
    return [-1] * count


def test_unknown_drafters_are_named():
    with pytest.raises(UserError, match="unknown drafter 'hydra': it must be one of specformer, medusa"):
        DraftConfig(drafter="hydra").bind(tiny.CONFIG)
