"""Losslessness on a small random model: the same tokens at every k, budget, row and drafter, and as naive decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import lowering_for
from specformer_jax.config import DraftConfig, SamplingParams, Shape, bucket
from specformer_jax.decoding import decode, sampling
from specformer_jax.decoding.logprobs import init_logprobs
from specformer_jax.decoding.state import DOUBT
from specformer_jax.nn import cache as cache_lib
from tests import tiny
from tests.decoding import by_hand, test_verify

HEAD = DraftConfig(max_draft_length=5)
HEADS = {
    "paper": HEAD,
    "causal": dataclasses.replace(HEAD, bidirectional=False),
    "position embedding": dataclasses.replace(HEAD, positional_ffn=False),
    "next token hook": dataclasses.replace(HEAD, next_token_hook=True),
    "attends context": dataclasses.replace(HEAD, attends_context=True, next_token_hook=True),
    "window": dataclasses.replace(HEAD, window=2, next_token_hook=True),
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
    check_draft_length(plain, REQUESTS, k)


def check_draft_length(expected, requests, k):
    model, params = tiny.make(HEAD)
    got, state = tiny.answers(model, params, PROMPTS, requests, k=k)
    assert got == expected
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
    """Requests in any row, beside empty rows or others' requests, in steps with more places than the drafts need."""
    model, params = tiny.make(HEAD)
    prompts = [None if empty[i] else PROMPTS[i] for i in order]
    got, _ = tiny.answers(model, params, prompts, [REQUESTS[i] for i in order], k=k, window=5)
    assert got == [[] if empty[i] else plain[i] for i in order]


@pytest.mark.parametrize("size", [4, 5, 7, 11, 16, 24])
def test_same_tokens_at_every_budget(plain, size):
    """From the rows' last tokens alone to more than all drafts; between them drafts are shared out by survival."""
    model, params = tiny.make(HEAD)
    prompts, lengths = jnp.asarray([[*p, *[0] * (18 - len(p))] for p in PROMPTS]), jnp.array([len(p) for p in PROMPTS])
    limit = jnp.array([r.max_new_tokens for r in REQUESTS])
    shape = Shape(4, 4, 8, 96)
    state = decode.jit_start(
        model, params, prompts, lengths, sampling.stack(REQUESTS), limit, shape=shape, max_new_tokens=24, draft_length=3
    )
    assert state.known.tolist() == (lengths + 1).tolist(), "every row has its first token"
    state = decode.jit_run(model, params, state, jnp.int32(24), size=size)
    assert bool(state.done.all())
    assert [by_hand.answer(state, row) for row in range(4)] == plain


def test_the_strict_mode_is_bitwise_the_same_in_bfloat16():
    """B and T fixed, whatever is drafted and whoever else is there; with XLA's bodies alone, too."""
    model, params = tiny.make(HEAD, dtype="bfloat16")
    jobs = list(zip(PROMPTS, REQUESTS, strict=True))
    for native in (True, False):
        with lowering_for("cpu", native=native):
            alone = [tiny.answers(model, params, [p], [r], k=0, rows=4, window=6)[0][0] for p, r in jobs]
            for k in (1, 3, 5):
                assert tiny.answers(model, params, PROMPTS, REQUESTS, k=k, rows=4, window=6)[0] == alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_long_table_is_as_good(plain, dtype):
    """Rows that could hold ten times as much; bfloat16 bit for bit."""
    model, params = tiny.make(HEAD, dtype=dtype)
    run = lambda positions: tiny.answers(model, params, PROMPTS, REQUESTS, k=3, positions=positions)[0]
    assert run(960) == (plain if dtype == "float32" else run(96))


def test_counts_add_up():
    model, params = tiny.make(HEAD)
    endless = dataclasses.replace(GREEDY, max_new_tokens=30)
    _, state = tiny.answers(model, params, PROMPTS, [endless] * 4, k=3)
    assert np.array_equal(state.known - state.prompt, 1 + state.steps + state.accepted.sum(axis=1))
    assert np.array_equal(state.from_draft.sum(axis=1), state.accepted.sum(axis=1))
    assert np.array_equal(state.read, state.known - 1), "all but the last token are in the cache"
    assert (np.asarray(state.accepted) <= np.asarray(state.drafted)).all()
    tried, right = np.asarray(state.outcomes).sum(axis=1).T
    assert (tried[1:] == right[:-1]).all(), "a later draft is tried where the earlier ones were right"
    assert (np.diff(np.asarray(state.accepted), axis=1) <= 0).all(), "a later draft counts only after the earlier ones"


def test_a_rows_record_is_what_its_drafts_did():
    """Step by step: how many were right, less what their confidence promised; and the chances follow the record."""
    model, params = tiny.make(HEAD)
    tokens, lengths = np.zeros((4, 32), np.int32), np.array([len(p) for p in PROMPTS[:4]], np.int32)
    for row, prompt in enumerate(PROMPTS[:4]):
        tokens[row, : len(prompt)] = prompt
    rows, limit = sampling.stack([GREEDY] * 4), jnp.full(4, 30, jnp.int32)
    fixed = dict(shape=Shape(4, 4, 8, 96), max_new_tokens=30, draft_length=3)
    state = decode.jit_start(model, params, jnp.asarray(tokens), jnp.asarray(lengths), rows, limit, **fixed)
    surplus, evidence = np.zeros(4), np.zeros(4)
    for _ in range(8):
        before = jax.device_get(state._replace(cache=()))
        promised = np.clip(before.confidence, 1e-4, 1 - 1e-4)
        state = decode.jit_run(model, params, state, jnp.int32(1), size=16, draft_length=3)
        for row in range(4):
            tried = int(np.asarray(state.drafted - before.drafted)[row].sum())
            right = int(np.asarray(state.accepted - before.accepted)[row].sum())
            judged = promised[row, : min(right + 1, tried)]
            surplus[row] += right - judged.sum()
            evidence[row] += (judged * (1 - judged)).sum()
        np.testing.assert_allclose(state.surplus, surplus, atol=1e-4)
        np.testing.assert_allclose(state.evidence, evidence, atol=1e-4)
    assert np.ptp(state.row_offset) > 0.1, "rows differ"
    np.testing.assert_allclose(state.row_offset, surplus / (evidence + DOUBT), atol=1e-4)


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


@pytest.mark.parametrize("chunk", [1, 5, 17, 18])
def test_a_prompt_in_chunks_beside_a_row_that_decodes(plain, chunk):
    """One flat batch holds the drafts of row 0 and a chunk of row 1's prompt, as in a continuous batch."""
    model, params = tiny.make(HEAD)
    request = dataclasses.replace(REQUESTS[3], max_new_tokens=24)
    state = by_hand.admit(by_hand.empty(model, 2, drafts=3), 0, PROMPTS[0], REQUESTS[0])
    step = lambda state: by_hand.step(model, params, state, size=22, chunk=chunk)
    while int(state.known[0]) < len(PROMPTS[0]) + 2:
        state = step(state)
    state = by_hand.admit(state, 1, PROMPTS[3], request)
    for begin in range(0, len(PROMPTS[3]), chunk):
        assert int(state.read[1]) == begin and by_hand.answer(state, 1) == []
        known, state = int(state.known[0]), step(state)
        assert int(state.known[0]) > known or bool(state.done[0]), "row 0 decodes on"
    assert len(by_hand.answer(state, 1)) == 1
    state = by_hand.finish(model, params, state, size=22, chunk=chunk)
    assert by_hand.answer(state, 0) == plain[0]
    assert by_hand.answer(state, 1) == tiny.naive(model, params, PROMPTS[3], request)


def test_what_is_drafted_does_not_depend_on_the_chunks():
    """The drafter reads the token after each prompt position, also where a chunk ends."""
    model, params = tiny.make(HEADS["next token hook"])

    def memory(chunk):
        state = by_hand.admit(by_hand.empty(model, 1, drafts=3), 0, PROMPTS[3], GREEDY)
        while int(state.known[0]) == len(PROMPTS[3]):
            state = by_hand.step(model, params, state, size=18, chunk=chunk)
        pages = state.cache[-1].v[state.pages[0]]
        return state.drafts, state.confidence, jnp.moveaxis(pages, 1, 0).reshape(pages.shape[1], -1, 8)[:, :18]

    (drafts, confidence, values), (cut_drafts, cut_confidence, cut_values) = memory(18), memory(5)
    assert np.array_equal(drafts, cut_drafts)
    np.testing.assert_allclose(confidence, cut_confidence, atol=1e-4)
    np.testing.assert_allclose(values, cut_values, atol=1e-5)


@pytest.mark.parametrize("company", [1, 2, 3, 8])
def test_what_is_drafted_does_not_depend_on_how_many_rows_take_drafts(company):
    """Eight rows answer, and some of them take drafts; each has the drafts that it would have alone."""
    model, params = tiny.make(HEADS["sequential"])

    def drafted(rows):
        state = by_hand.empty(model, 8, drafts=3)
        for row in range(8):
            state = by_hand.admit(state, row, [4 + row, *PROMPTS[0]], GREEDY)
        state = state._replace(draft_cap=jnp.zeros(8, jnp.int32).at[jnp.array(rows)].set(3))
        for _ in range(2):
            state = by_hand.step(model, params, state, size=48, chunk=48)
        return np.asarray(state.drafts), np.asarray(state.confidence), np.asarray(state.done)

    rows = list(range(8))[-company:]
    drafts, confidence, done = drafted(rows)
    assert np.flatnonzero((drafts >= 0).all(axis=1)).tolist() == [row for row in rows if not done[row]] != []
    for row in rows:
        alone, sure, _ = drafted([row])
        np.testing.assert_array_equal(drafts[row], alone[row])
        np.testing.assert_allclose(confidence[row], sure[row], atol=1e-4)


def test_pages_may_lie_anywhere(plain):
    """Rows take pages of a shuffled cache that holds more than they need, one of them when it comes to it."""
    model, params = tiny.make(HEADS["attends context"])
    order = np.random.default_rng(0).permutation(16).tolist()
    state = by_hand.empty(model, 4, drafts=3, pages=16)
    for row, (prompt, request) in enumerate(zip(PROMPTS, REQUESTS, strict=True)):
        tables = -(-(len(prompt) + request.max_new_tokens) // cache_lib.page_size())
        pages, order = order[:tables], order[tables:]
        unused = [0] * (state.pages.shape[1] - tables)  # what a row has not come to may be anyone's page
        state = by_hand.admit(state, row, prompt, request, pages=pages + unused)
    expected = [tiny.naive(model, params, p, r) for p, r in zip(PROMPTS, REQUESTS, strict=True)]
    state = by_hand.finish(model, params, state, size=22, chunk=18)
    assert [by_hand.answer(state, row) for row in range(4)] == expected


@pytest.mark.parametrize("name", ["next token hook", "attends context"])
def test_rows_share_the_pages_of_a_prefix(name):
    """A row whose prompt begins as another's reads on after the pages that hold the beginning, which both then use."""
    model, params = tiny.make(HEADS[name])
    page = cache_lib.page_size()
    prefix = [int(x) for x in np.random.default_rng(0).integers(4, 13, page + 1)]
    first, second = [*prefix, 5, 6], [*prefix, 7]
    requests = [GREEDY, REQUESTS[1]]
    state = by_hand.empty(model, 2, drafts=3, pages=7)
    state = by_hand.admit(state, 0, first, requests[0], pages=[4, 0, 1, 6, 6, 6])
    step = lambda state: by_hand.step(model, params, state, size=12, chunk=8)
    while int(state.read[0]) < len(first):
        state = step(state)
    # The drafter's keys at a position depend on the token after it, so that one is the same, too.
    state = by_hand.admit(state, 1, second, requests[1], pages=[4, 2, 3, 6, 6, 6], read=page)
    while not bool(state.done.all()):
        state = step(state)
    for row, prompt in enumerate((first, second)):
        assert by_hand.answer(state, row) == tiny.naive(model, params, prompt, requests[row])
    alone = by_hand.admit(by_hand.empty(model, 2, drafts=3), 1, second, requests[1])
    alone = by_hand.finish(model, params, alone, size=12, chunk=8)
    assert np.array_equal(alone.accepted[1], state.accepted[1]), "the drafts are those of a row that shares nothing"


def test_a_row_that_was_preempted_goes_on_from_its_tokens(plain):
    """It is released in the midst of its answer, its pages are overwritten, and another row reads all of it again."""
    model, params = tiny.make(HEAD)
    state = by_hand.empty(model, 2, drafts=3)
    state = by_hand.admit(state, 0, PROMPTS[1], REQUESTS[1])
    for _ in range(4):
        state = by_hand.step(model, params, state, size=22, chunk=18)
    so_far = by_hand.answer(state, 0)
    assert 0 < len(so_far) < len(plain[1]) and not bool(state.done[0])
    state = by_hand.release(state, 0)
    state = by_hand.admit(state, 0, PROMPTS[0], REQUESTS[0])
    state = by_hand.admit(state, 1, PROMPTS[1], REQUESTS[1], answer=so_far)
    state = by_hand.finish(model, params, state, size=22, chunk=18)
    assert by_hand.answer(state, 0) == plain[0]
    assert by_hand.answer(state, 1) == plain[1]


@pytest.mark.parametrize("seed", range(3))
def test_same_tokens_whatever_the_steps(plain, seed):
    """Any steps in any order over three rows: requests come, read in chunks, are preempted and come back elsewhere."""
    model, params = tiny.make(HEAD)
    random, steps = np.random.default_rng(seed), [(3, 0), (5, 2), (12, 0), (12, 9)]  # size and chunk
    state = by_hand.empty(model, 3, drafts=3)
    waiting, running, answers, arrival = [(i, []) for i in range(4)], {}, {}, 0
    while waiting or running:
        for row in sorted({0, 1, 2} - running.keys()):
            if waiting:
                i, so_far = waiting.pop(0)
                state = by_hand.admit(state, row, PROMPTS[i], REQUESTS[i], answer=so_far, arrival=arrival)
                running[row], arrival = i, arrival + 1
        for _ in range(random.integers(1, 4)):
            size, chunk = steps[random.integers(len(steps))]
            state = by_hand.step(model, params, state, size=size, chunk=chunk)
        state = by_hand.step(model, params, state, size=12, chunk=9)  # so that it ends
        for row in list(running):
            if bool(state.done[row]):
                answers[running.pop(row)] = by_hand.answer(state, row)
        if running and random.random() < 0.3:
            row = int(random.choice(sorted(running)))
            waiting.append((running.pop(row), by_hand.answer(state, row)))
            state = by_hand.release(state, row)
    assert [answers[i] for i in range(4)] == plain


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
    with pytest.raises(ValueError, match="40 positions cannot hold a prompt and 40 new tokens"):
        tiny.answers(model, params, PROMPTS, REQUESTS, k=3, positions=40)
    with pytest.raises(ValueError, match=r"prompts \(4, 32\) must be \[4, 24 at most\]"):
        tiny.answers(model, params, PROMPTS, REQUESTS, k=3, positions=24)
