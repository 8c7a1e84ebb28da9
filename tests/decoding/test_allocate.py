"""Who gets the places of a call: rows first, prompts by arrival, drafts by survival, and no place is wasted."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specformer_jax.config import SamplingParams, Shape
from specformer_jax.decoding import sampling
from specformer_jax.decoding.allocate import allocate, share, survival
from specformer_jax.decoding.model import Model
from specformer_jax.decoding.state import FARTHEST, init_state
from specformer_jax.nn.target import Target
from tests import tiny

B, J, C = 5, 3, 48
chances = st.lists(
    st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), min_size=J, max_size=J), min_size=B, max_size=B
)
small = lambda low, high: st.lists(st.integers(low, high), min_size=B, max_size=B)
jit_allocate = jax.jit(allocate, static_argnames=("size", "chunk"))


def test_the_drawing_in_the_docstring_is_what_happens():
    rows = re.findall(r"row \w +(\d+)   ([\d.]+ [\d.]+ [\d.]+) +(\d+) +(\d+)\n", share.__doc__)
    assert len(rows) == 4
    unread = jnp.array([int(row[0]) for row in rows])
    worth = jnp.array([list(map(float, row[1].split())) for row in rows])
    budget = share(unread, worth, jnp.arange(4), 8, 3)
    assert budget.reads.tolist() == [int(row[2]) for row in rows]
    assert budget.drafts.tolist() == [int(row[3]) for row in rows]


@settings(max_examples=100, deadline=None)
@given(
    unread=small(0, 6),
    worth=chances,
    arrival=st.permutations(range(B)),
    size=st.integers(1, 24),
    chunk=st.integers(0, 12),
)
def test_places_are_shared_by_the_rules(unread, worth, arrival, size, chunk):
    budget = share(jnp.array(unread), jnp.array(worth), jnp.array(arrival), size, chunk)
    reads, drafts = np.asarray(budget.reads), np.asarray(budget.drafts)
    unread, arrival = np.array(unread), np.array(arrival)
    decoding, prompts = unread == 1, np.where(unread > 1, unread, 0)
    free = size - reads.sum() - drafts.sum()

    assert free >= 0, "never more than there are"
    assert (reads[unread == 0] == 0).all() and (reads <= unread).all(), "empty and finished rows cost no place"
    assert reads[decoding].sum() == min(decoding.sum(), size), "rows that decode come first"

    of_prompts = np.where(unread > 1, reads, 0)
    assert of_prompts.sum() == min(chunk, size - reads[decoding].sum(), prompts.sum()), "as much as the cap allows"
    late = [arrival[row] for row in range(B) if of_prompts[row] > 0]
    early = [row for row in range(B) if late and arrival[row] < max(late)]
    assert (of_prompts[early] == prompts[early]).all(), "who came first is read first"

    # A draft is worth no more than those before it; the rules see to that, whatever they are given.
    worth = np.minimum.accumulate(np.array(worth, np.float32), axis=1)
    assert (drafts[~decoding | (reads == 0)] == 0).all(), "drafts stand behind a row's last token"
    taken = [worth[row, slot] for row in range(B) for slot in range(drafts[row])]
    left = [worth[row, slot] for row in range(B) if decoding[row] and reads[row] for slot in range(drafts[row], J)]
    assert all(x > 0 for x in taken)
    assert not taken or not left or min(taken) >= max(left), "the likeliest drafts are read"
    assert free == 0 or not any(left), "no place stays free while a draft waits"


def batch(**fields):
    """B rows that decode, three tokens in, with drafts 7 8 9."""
    state = init_state(Model(Target(tiny.CONFIG)), Shape(B, J + 1, 8, C), sampling.stack([SamplingParams()] * B))
    rows = lambda x: jnp.full(B, x, jnp.int32)
    state = state._replace(
        known=rows(3),
        read=rows(2),
        limit=rows(C),
        done=jnp.zeros(B, bool),
        drafts=jnp.tile(jnp.array([7, 8, 9]), (B, 1)),
    )
    return state._replace(**{name: jnp.asarray(x, getattr(state, name).dtype) for name, x in fields.items()})


@settings(max_examples=60, deadline=None)
@given(
    confidence=chances,
    cap=small(0, J),
    left=small(1, J + 2),
    found=small(0, J),
    calibration=st.lists(st.tuples(st.floats(0, 3), st.floats(-2, 2)), min_size=J, max_size=J),
)
def test_survival_falls_along_a_chain_and_ends_with_it(confidence, cap, left, found, calibration):
    """At the row's cap, one short of its limit, and where the drafter found no more."""
    drafts = np.where(np.arange(J) < np.array(found)[:, None], 7, -1)
    state = batch(
        confidence=confidence, draft_cap=cap, limit=3 + np.array(left), drafts=drafts, calibration=calibration
    )
    chance = np.asarray(survival(state))
    assert (np.diff(chance, axis=1) <= 0).all() and (chance >= 0).all() and (chance <= 1).all()
    longest = np.minimum(np.minimum(cap, np.array(left) - 1), found)
    assert ((chance > 0).sum(axis=1) == longest).all(), "every draft that may be read is worth something"


def test_survival_is_the_product_of_calibrated_confidence():
    confidence = np.tile(np.array([0.9, 0.5, 0.2]), (B, 1))
    as_it_is = survival(batch(confidence=confidence))
    np.testing.assert_allclose(as_it_is[0], np.cumprod([0.9, 0.5, 0.2]), rtol=1e-5)
    calibrated = survival(batch(confidence=confidence, calibration=[[2.0, 0.5], [0.0, 0.0], [1.0, -1.0]]))
    logit = lambda p: np.log(p / (1 - p))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    by_hand = np.cumprod([sigmoid(2 * logit(0.9) + 0.5), 0.5, sigmoid(logit(0.2) - 1)])
    np.testing.assert_allclose(calibrated[0], by_hand, rtol=1e-5)


def test_a_row_that_was_luckier_than_promised_is_promised_more():
    surplus, evidence = np.array([0.0, 3.0, -3.0, 60.0, 0.0]), np.array([0.0, 2.0, 2.0, 1.0, 5.0])
    state = batch(confidence=np.full((B, J), 0.5), surplus=surplus, evidence=evidence)
    odds = np.array([0.0, 0.5, -0.5, FARTHEST, 0.0])
    np.testing.assert_allclose(survival(state)[:, 0], 1 / (1 + np.exp(-odds)), rtol=1e-5)
    flat = allocate(state, B + 4)
    assert flat.drafts.tolist() == [0, 1, 0, 3, 0], "and its drafts are read"


@st.composite
def batches(draw):
    """Fields of B rows: some done, some reading their prompt, some decoding, with chains of any length."""
    known = np.array(draw(small(1, C - J - 2)))
    begun = np.array(draw(small(0, C)))
    decodes = np.array(draw(st.lists(st.booleans(), min_size=B, max_size=B)))
    found = np.array(draw(small(0, J)))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    return dict(
        tokens=random.integers(1, 13, (B, C)),
        known=known,
        read=np.where(decodes, known - 1, np.minimum(begun, known - 1)),
        done=draw(st.lists(st.booleans(), min_size=B, max_size=B)),
        arrival=draw(st.permutations(range(B))),
        drafts=np.where(np.arange(J) < found[:, None], random.integers(1, 13, (B, J)), -1),
        confidence=draw(chances),
        pages=random.permutation(B * 3).reshape(B, 3),
    )


@settings(max_examples=60, deadline=None)
@given(fields=batches(), budget=st.sampled_from([(3, 0), (5, 0), (9, 4), (20, 0), (24, 16), (64, 64)]))
def test_the_flat_batch_is_what_the_rows_say(fields, budget):
    """Row by row its next committed tokens, then its drafts, side by side; behind them nobody's places."""
    size, chunk = budget
    state = batch(**fields)
    unread = np.where(state.done, 0, state.known - state.read)
    shares = share(jnp.asarray(unread), survival(state), state.arrival, size, chunk)
    tokens, read, drafts = np.asarray(state.tokens), np.asarray(state.read), np.asarray(state.drafts)
    expected = [
        (row, read[row] + i, text[i])
        for row in range(B)
        for reads, extra in [(int(shares.reads[row]), int(shares.drafts[row]))]
        for text in [[*tokens[row, read[row] : read[row] + reads], *drafts[row, :extra]]]
        for i in range(reads + extra)
    ]
    flat = jit_allocate(state, size, chunk=chunk)
    seat, position, table = map(np.asarray, (flat.places.row, flat.places.position, flat.places.table))
    token, seats, last, extra, asks, reads = (np.asarray(x) for x in flat[1:])
    count = len(expected)
    assert list(zip(seats[seat], position, token, strict=True))[:count] == expected
    assert (position[count:] == -1).all() and (token[count:] == 0).all()
    assert len(position) == len(token) == size

    taken = seats < B
    rows = seats[taken]
    assert rows.tolist() == [row for row in range(B) if shares.reads[row] > 0], "seats are in the order of the rows"
    assert (seats[~taken] == B).all() and (reads[~taken] == 0).all() and not asks[~taken].any()
    assert (reads[taken] == shares.reads[rows]).all() and (extra[taken] == shares.drafts[rows]).all()
    assert (asks[taken] == (reads[taken] == unread[rows])).all(), "who has read all asks for a token"
    assert (table[taken] == np.asarray(state.pages)[rows]).all()
    assert (seats[seat[last[taken]]] == rows).all()
    assert (position[last[taken]] == read[rows] + reads[taken] - 1).all(), "a seat's last committed token"
    assert (reads + extra).max() <= flat.places.longest


def test_what_follows_a_place_is_the_rows_next_token():
    tokens = np.arange(B * C).reshape(B, C)
    state = batch(tokens=tokens, known=[1, 9, 3, C - J - 1, 4], read=[0, 2, 2, C - J - 2, 0])
    flat = jit_allocate(state, 24, chunk=16)
    mine = np.asarray(flat.places.position) >= 0
    row, position = np.asarray(flat.seats)[flat.places.row][mine], np.asarray(flat.places.position)[mine]
    assert np.asarray(flat.following(state.tokens))[mine].tolist() == tokens[row, position + 1].tolist()


def test_plain_decoding_takes_one_place_a_row():
    """Drafts wait where there are as many places as rows; a row that is done makes room for one."""
    confidence = [[0.5] * J, [0.9] * J, [0.5] * J, [0.5] * J, [0.5] * J]
    flat = allocate(batch(confidence=confidence), B)
    assert flat.drafts.tolist() == [0] * B and flat.asks.all()
    flat = allocate(batch(confidence=confidence, done=np.arange(B) == 4), B)
    assert flat.seats.tolist() == [0, 1, 2, 3, B] and flat.drafts.tolist() == [0, 1, 0, 0, 0]
