"""Losslessness on a small random model: the same tokens at every k, batch, row and drafter, and as naive decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import long_cache
from specformer_jax.config import DraftConfig, SamplingParams, Shape, bucket
from specformer_jax.decoding import decode, sampling
from specformer_jax.decoding.logprobs import init_logprobs
from specformer_jax.decoding.state import init_state
from tests import tiny
from tests.decoding import test_verify

HEAD = DraftConfig(max_draft_length=5)
HEADS = {
    "paper": HEAD,
    "causal": dataclasses.replace(HEAD, bidirectional=False),
    "position embedding": dataclasses.replace(HEAD, positional_ffn=False),
    "next token hook": dataclasses.replace(HEAD, next_token_hook=True),
    "attends context": dataclasses.replace(HEAD, attends_context=True, next_token_hook=True),
    "sequential": dataclasses.replace(HEAD, sequential_ffn=24, draft_vocab_size=9),
    "pruned, wide, two blocks": dataclasses.replace(HEAD, draft_vocab_size=9, ffn=80, draft_blocks=2),
}
GREEDY = SamplingParams(max_new_tokens=24)
REQUESTS = [
    GREEDY,
    SamplingParams(temperature=0.7, top_p=0.9, min_p=0.05, seed=1, max_new_tokens=24),
    SamplingParams(temperature=1.3, top_k=4, seed=2**32 - 1, max_new_tokens=17),
    SamplingParams(temperature=1.0, seed=7, max_new_tokens=1),
]
PROMPTS = [[5, 1, 2, 11, 7], [4], list(range(4, 12)), [6, 5] * 9]


@pytest.fixture(scope="module")
def plain():
    """The answers of naive decoding."""
    model, params = tiny.make(HEAD)
    return [tiny.naive(model, params, p, r) for p, r in zip(PROMPTS, REQUESTS, strict=True)]


def test_naive_answers_are_worth_comparing(plain):
    assert any(len(answer) == r.max_new_tokens for answer, r in zip(plain, REQUESTS, strict=True))
    assert len({tuple(answer) for answer in plain}) == len(plain)


@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_same_tokens_at_every_draft_length(plain, k):
    model, params = tiny.make(HEAD)
    got, state = tiny.answers(model, params, PROMPTS, REQUESTS, k=k)
    assert got == plain
    assert int(state.accepted.sum()) > 0 or k == 0, "no draft was ever right: the test proves nothing"


@pytest.mark.parametrize("name", HEADS)
def test_same_tokens_with_every_head(plain, name):
    model, params = tiny.make(HEADS[name])
    params = params | {"target": tiny.make(HEAD)[1]["target"]}
    if "draft_vocab" in params:
        ids = params["draft_vocab"]["token_ids"]
        params["draft_vocab"] = {"token_ids": ids, "lm_head": params["target"]["lm_head"][ids]}
    assert tiny.answers(model, params, PROMPTS, REQUESTS, k=4)[0] == plain


def test_same_tokens_without_a_head(plain):
    model, _ = tiny.make(None)
    assert tiny.answers(model, tiny.make(HEAD)[1], PROMPTS, REQUESTS, k=0)[0] == plain


@pytest.mark.parametrize("switches", [{"coupled": False}, {"truncation": False}])
def test_switches_do_not_change_the_tokens(plain, switches):
    model, params = tiny.make(HEAD, **switches)
    chosen = [0, 3] if "truncation" in switches else [0, 1, 2, 3]  # without truncation no top-k, top-p or min-p
    got, _ = tiny.answers(model, params, [PROMPTS[i] for i in chosen], [REQUESTS[i] for i in chosen], k=3)
    assert got == [plain[i] for i in chosen]


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(range(4)),
    empty=st.lists(st.booleans(), min_size=4, max_size=4),
    k=st.sampled_from([0, 3]),
)
def test_same_tokens_in_every_row_and_company(plain, order, empty, k):
    """Requests in any row, beside empty rows or others' requests, in a window wider than the drafts need."""
    model, params = tiny.make(HEAD)
    prompts = [None if empty[i] else PROMPTS[i] for i in order]
    got, _ = tiny.answers(model, params, prompts, [REQUESTS[i] for i in order], k=k, window=5)
    assert got == [[] if empty[i] else plain[i] for i in order]


def test_bfloat16_is_bitwise_the_same_in_one_shape():
    """The strict mode of the contract: B and W fixed, whatever is drafted and whoever else is there."""
    model, params = tiny.make(HEAD, dtype="bfloat16")
    alone = [
        tiny.answers(model, params, [p], [r], k=0, rows=4, window=6)[0][0]
        for p, r in zip(PROMPTS, REQUESTS, strict=True)
    ]
    for k in (1, 3, 5):
        assert tiny.answers(model, params, PROMPTS, REQUESTS, k=k, rows=4, window=6)[0] == alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_long_cache_is_as_good(plain, monkeypatch, dtype):
    """Read in blocks of 8, of which the rows use different numbers; bfloat16 bit for bit, as it is one shape."""
    slots, calls = long_cache.LONG + 77, []
    attend = functools.partial(long_cache.attend, block=8)
    monkeypatch.setattr(long_cache, "attend", lambda *a, **k: calls.append(1) or attend(*a, **k))
    model, params = tiny.make(HEAD, dtype=dtype)
    run = lambda prompts, requests, k: tiny.answers(
        model, params, prompts, requests, k=k, rows=4, window=6, positions=slots
    )[0]
    alone = [run([p], [r], 0)[0] for p, r in zip(PROMPTS, REQUESTS, strict=True)]
    assert alone == run(PROMPTS, REQUESTS, 3) == run(PROMPTS, REQUESTS, 5)
    assert calls and (dtype == "bfloat16" or alone == plain)


def test_counts_add_up():
    model, params = tiny.make(HEAD)
    endless = dataclasses.replace(GREEDY, max_new_tokens=30)
    _, state = tiny.answers(model, params, PROMPTS, [endless] * 4, k=3)
    assert np.array_equal(state.emitted, 1 + state.steps + state.accepted.sum(axis=1))
    assert (np.diff(np.asarray(state.accepted), axis=1) <= 0).all(), "a later draft counts only after the earlier ones"


def test_a_state_is_what_its_annotations_say():
    model, params = tiny.make(HEAD)
    _, state = tiny.answers(model, params, PROMPTS, REQUESTS, k=4)
    tiny.check_shapes(state)
    tiny.check_shapes(init_logprobs(3, 8, 13))
    with pytest.raises(AssertionError, match="drafts is int32"):
        tiny.check_shapes(state._replace(drafts=state.drafts[1:]))


def test_stops_at_the_end_token_and_the_limit(plain):
    model, params = tiny.make(HEAD)
    got, state = tiny.answers(model, params, PROMPTS, REQUESTS, k=5)
    for answer, request in zip(got, REQUESTS, strict=True):
        assert len(answer) <= request.max_new_tokens
        assert not set(answer[:-1]) & set(tiny.CONFIG.eos_ids)
    assert bool(state.done.all())


@settings(max_examples=10, deadline=None)
@given(split=st.integers(1, 17))
def test_prefill_in_any_chunks_beside_a_row_that_decodes(plain, split):
    """Row 0 decodes on while row 1 is filled in two chunks, as a continuous batch would."""
    model, params = tiny.make(HEAD)
    shape = Shape(2, 4, 18, 96)
    state = init_state(model, shape, sampling.stack([REQUESTS[0], REQUESTS[3]]), jnp.array([24, 24]), 40)
    prefill = jax.jit(decode.prefill, static_argnames=("model", "draft_length"))
    step = jax.jit(decode.step, static_argnames=("model", "draft_length"))

    def read(state, row, begin, ids, after, ends):
        tokens = np.zeros((2, 18), np.int32)
        tokens[row, : len(ids)] = ids
        at = np.full(2, -1, np.int32)
        at[row] = begin
        end = np.full(2, -1, np.int32)
        end[row] = ends
        return prefill(
            model,
            params,
            state,
            jnp.asarray(tokens),
            jnp.full(2, after),
            jnp.asarray(at),
            jnp.asarray(end),
            draft_length=3,
        )

    long = PROMPTS[3]
    state = read(state, 0, 0, PROMPTS[0], 0, len(PROMPTS[0]) - 1)
    state = step(model, params, state, draft_length=3)
    state = read(state, 1, 0, long[:split], long[split], -1)
    state = step(model, params, state, draft_length=3)
    state = read(state, 1, split, long[split:], 0, len(long) - split - 1)
    while not bool(state.done.all()):
        state = step(model, params, state, draft_length=3)
    expected = tiny.naive(*tiny.make(HEAD), long, dataclasses.replace(REQUESTS[3], max_new_tokens=24))
    assert np.asarray(state.output)[0, : state.emitted[0]].tolist() == plain[0]
    assert np.asarray(state.output)[1, : state.emitted[1]].tolist() == expected


def test_what_is_drafted_does_not_depend_on_the_chunks():
    """The drafter reads the token after each prompt position, also where a chunk ends."""
    model, params = tiny.make(HEADS["next token hook"])
    prompts = jnp.asarray([[*PROMPTS[3], 0, 0]])
    requests = sampling.stack([GREEDY]), jnp.array([24])

    def memory(chunk):
        shape = Shape(1, 4, chunk, 64)
        state = decode.jit_start(
            model, params, prompts, jnp.array([18]), *requests, shape=shape, max_new_tokens=24, draft_length=3
        )
        return state.drafts, state.cache[-1].v[:, :, :18]

    (drafts, values), (cut_drafts, cut_values) = memory(20), memory(5)
    assert np.array_equal(drafts, cut_drafts)
    np.testing.assert_allclose(values, cut_values, atol=1e-5)


def test_speculation_samples_like_plain_decoding_in_a_mixed_batch():
    """The second token, which a verification pass commits, among finished and empty rows: chi-square per request."""
    model, params = tiny.make(HEAD)
    kinds = [dataclasses.replace(r, max_new_tokens=3) for r in test_verify.REQUESTS]
    kinds += [SamplingParams(temperature=1.0, max_new_tokens=1), SamplingParams(max_new_tokens=1)]  # finished at once
    repeats, prompt = 400, PROMPTS[0]
    requests = [
        dataclasses.replace(kind, seed=kind_index * repeats + i)
        for kind_index, kind in enumerate(kinds)
        for i in range(repeats)
    ]
    prompts = [None if i % 7 == 0 else prompt for i in range(len(requests))]
    got, _ = tiny.answers(model, params, prompts, requests, k=3, positions=48, max_new_tokens=3)
    tested = 0
    for i, kind in enumerate(kinds):
        rows = [got[j] for j in range(i * repeats, (i + 1) * repeats) if prompts[j] is not None]
        assert all(len(row) == 1 for row in rows) or kind.max_new_tokens > 1
        for first in {row[0] for row in rows if len(row) > 1}:
            seconds = np.array([row[1] for row in rows if row[0] == first])
            if len(seconds) >= 100:
                expected = test_verify.processed_softmax(tiny.next_logits(model, params, [*prompt, first]), kind)
                assert test_verify.p_value(seconds, expected) > 1e-6
                tested += 1
    assert tested >= len(test_verify.REQUESTS)
    assert all(not row for row, p in zip(got, prompts, strict=True) if p is None)


def test_nothing_compiles_again_inside_a_bucket():
    """Prompt lengths, batch fill, sampling parameters, seeds and budgets are data, not shapes."""
    model, params = tiny.make(HEAD)
    tiny.answers(model, params, PROMPTS, REQUESTS, k=2)
    before = decode.jit_generate._cache_size()
    tiny.answers(model, params, [PROMPTS[0][:2], None, PROMPTS[3]], [REQUESTS[2], GREEDY, GREEDY], k=2, rows=4)
    tiny.answers(model, params, PROMPTS[::-1], [dataclasses.replace(r, seed=99) for r in REQUESTS], k=2)
    assert decode.jit_generate._cache_size() == before
    assert {bucket(n, 64) for n in range(65, 97)} == {96}


def test_shapes_that_do_not_fit_are_named():
    model, params = tiny.make(HEAD)
    with pytest.raises(ValueError, match=r"draft length 6 is not within 0 and the window's 6 drafts or the head's 5"):
        tiny.answers(model, params, PROMPTS, REQUESTS, k=6)
    with pytest.raises(ValueError, match="cannot hold 40 new tokens"):
        tiny.answers(model, params, PROMPTS, REQUESTS, k=3, positions=41)
    with pytest.raises(ValueError, match="a multiple of the chunk 7"):
        tiny.answers(model, params, PROMPTS, REQUESTS, k=3, chunk=7)
