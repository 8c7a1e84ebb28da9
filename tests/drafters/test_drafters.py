"""The drafters behind one seam: the same tokens whoever drafts, and chains that are what each drafter says they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specformer_jax.config import DraftConfig, SamplingParams
from specformer_jax.decoding import decode
from specformer_jax.decoding.allocate import allocate
from specformer_jax.decoding.verify import Verdict, commit
from specformer_jax.drafters import logitspec
from specformer_jax.drafters.logitspec import retrieve
from specformer_jax.drafters.ngram import LONGEST, REPEATED, WithLookup, lookup
from specformer_jax.errors import UserError
from tests import tiny
from tests.decoding import by_hand, test_decode

OTHERS = ("medusa", "eagle", "dflash", "kv-kv", "kv-hybrid", "ngram", "logitspec")


def make(name: str):
    """A random drafter on the target that `test_decode` has answers of; KV reuse in the form that its name ends in."""
    drafter, _, reuse = name.partition("-")
    model, params = tiny.make(DraftConfig(max_draft_length=5, drafter=drafter, reuse=reuse or "hybrid"))
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


@pytest.mark.parametrize("drafter", [*OTHERS, "lookup"])
def test_same_tokens_from_few_places_beside_prompts(plain, drafter):
    """Rows come one after the other; drafts take what is left of a flat batch that prompts are read in, too."""
    model, params = tiny.make(test_decode.HEAD) if drafter == "lookup" else make(drafter)
    model = with_lookup(model) if drafter == "lookup" else model
    state = by_hand.empty(model, 4, drafts=3)
    for row, (prompt, request) in enumerate(zip(test_decode.PROMPTS, test_decode.REQUESTS, strict=True)):
        state = by_hand.admit(state, row, prompt, request)
        state = by_hand.step(model, params, state, size=9, chunk=5)
    state = by_hand.finish(model, params, state, size=9, chunk=5)
    assert [by_hand.answer(state, row) for row in range(4)] == plain


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
    return find(jnp.asarray(history), end, token, count=count, shortest=shortest)[0].tolist()


def naive(text: list[int], count: int, shortest: int) -> list[int]:
    for length in range(LONGEST, shortest - 1, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if len(text) > length and text[end - length : end] == text[-length:]:
                ahead = list(text)
                for i in range(count):
                    ahead.append(ahead[end + i])
                return ahead[len(text) :]
    return [-1] * count


def test_logitspec_by_the_definition():
    """Against the same choice written the naive way, on random text over few letters and candidates in any order."""
    random, retrieved = np.random.default_rng(1), jax.jit(retrieve, static_argnames="count")
    for _ in range(60):
        text = random.integers(0, 6, random.integers(1, 14)).tolist()
        candidates = random.permutation(6)[:4].tolist()
        history = np.full(20, 9, np.int32)
        history[: len(text) - 1] = text[:-1]
        end, token = jnp.int32(len(text) - 1), jnp.int32(text[-1])
        got, sure = retrieved(jnp.asarray(history), end, token, jnp.array(candidates), count=4)
        assert got.tolist() == naive_logitspec(text, candidates, 4), (text, candidates)
        assert ((sure > 0) == (got >= 0)).all()


def naive_logitspec(text: list[int], candidates: list[int], count: int) -> list[int]:
    candidates = [each for each in candidates if each != text[-1]]
    before = [longest_run([*text, each]) - 1 for each in candidates]
    plain, best = longest_run(text), max(range(len(candidates)), key=lambda i: max(before[i], 0))
    if before[best] >= max(plain, 1) or plain < logitspec.REPEATED:
        return [candidates[best], *naive([*text, candidates[best]], count - 1, 1)]
    return naive(text, count, 1)


def longest_run(text: list[int]) -> int:
    """How many of the newest tokens have stood side by side before, at most `LONGEST`."""
    runs = [n for n in range(1, LONGEST + 1) for end in range(n, len(text)) if text[end - n : end] == text[-n:]]
    return max(runs, default=0)


def test_logitspec_asks_the_logits_that_chose_the_newest_token():
    """Where nothing is repeated it drafts the target's likeliest token but for that one."""
    model, params = tiny.make(DraftConfig(max_draft_length=4, drafter="logitspec"))
    texts = jnp.array([[5, 6, 7, 8, 9, 10, 11, 4, 1], [2, 9, 4, 11, 8, 6, 5, 7, 12]])
    for text, chain in zip(texts.tolist(), chains(model, params, texts), strict=True):
        order = np.argsort(-tiny.next_logits(model, params, text[:-1]))
        assert chain[0] == next(token for token in order if token != text[-1])


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
    """The drafts after each text, of which the target reads all but the last token and is taken to choose that."""
    state = by_hand.empty(model, len(texts), drafts=4, positions=32)
    for row, text in enumerate(texts.tolist()):
        state = by_hand.admit(state, row, text[:-1], SamplingParams(max_new_tokens=9))
    size = texts.size
    flat = allocate(state, size, chunk=size)
    out = model.read(params, flat.token, flat.places, state.cache)
    verdict = Verdict(jnp.zeros(len(texts), jnp.int32), texts[:, -1], jnp.tile(texts[:, -1:], (1, 5)))
    state = commit(state, flat, verdict, ())
    context, cache = model.observe(params, out.hooks, flat.following(state.tokens), flat.places, out.cache)
    return decode.propose(model, params, state._replace(cache=cache), flat, verdict, context).drafts.tolist()


def test_unknown_drafters_are_named():
    with pytest.raises(UserError, match="unknown drafter 'hydra': it must be one of specformer, medusa"):
        DraftConfig(drafter="hydra").bind(tiny.CONFIG)
