"""Block verification in whole decode steps: answers of a tiny model are drawn from what plain decoding draws from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specformer_jax.config import DraftConfig, SamplingParams
from specformer_jax.decoding.allocate import allocate
from specformer_jax.decoding.model import Model
from specformer_jax.decoding.state import BROKEN
from specformer_jax.decoding.verification.kind import BLOCK, Verification
from specformer_jax.decoding.verify import verify
from specformer_jax.drafters.ngram import WithLookup
from specformer_jax.errors import UserError
from tests import tiny
from tests.decoding import by_hand, test_decode
from tests.decoding.verification import trees

HEAD = DraftConfig(max_draft_length=3)
DRAFTERS = {
    "sequential": (dataclasses.replace(HEAD, sequential_ffn=24, draft_vocab_size=9), False),
    "with lookup": (HEAD, True),
    "eagle": (dataclasses.replace(HEAD, drafter="eagle"), False),
    "ngram": (dataclasses.replace(HEAD, drafter="ngram"), False),
}
LATER = "with lookup", "eagle"  # in the slow run
REQUEST = SamplingParams(temperature=1.6, max_new_tokens=4)
PROMPT = [5, 1, 2, 11, 7, 5, 1, 2]  # lookup finds its last three tokens
ROWS = 1024
V = tiny.CONFIG.vocab_size
P_VALUE = 1e-3 / (len(DRAFTERS) + 1)


def make(name: str, **switches) -> tuple[Model, dict]:
    """A tiny model that draws its drafts."""
    draft, lookup = DRAFTERS[name]
    model, params = tiny.make(draft, verification=Verification(BLOCK), **switches)
    if lookup:
        model = dataclasses.replace(model, drafter=WithLookup.around(model.drafter))
    return model, params


@functools.cache
def law(request: SamplingParams, begin: tuple[int, ...]) -> np.ndarray:
    """f64[V, V]: how likely plain decoding says two tokens after these; what follows an end token counts as 0."""
    model, params = tiny.make(HEAD)

    def own(ids):
        logits = tiny.next_logits(model, params, [*PROMPT, *ids])
        weight = np.exp((logits - logits.max()) / request.temperature) * tiny.keep(logits, request)
        return weight / weight.sum()

    first, found = own(begin), np.zeros((V, V))
    for token in range(V):
        after = np.eye(V)[0] if token in tiny.CONFIG.eos_ids else own((*begin, token))
        found[token] = first[token] * after
    return found


def check(model, params, request):
    """Tokens two and three of many answers, those after the commonest first token: the first comes without drafts."""
    params = params | {"target": tiny.make(HEAD)[1]["target"]}
    if "draft_vocab" in params:
        ids = params["draft_vocab"]["token_ids"]
        params["draft_vocab"] = {"token_ids": ids, "lm_head": params["target"]["lm_head"][ids]}
    seeds = np.random.default_rng(3).integers(0, 2**32, ROWS)
    requests = [dataclasses.replace(request, seed=int(seed)) for seed in seeds]
    answers, state = tiny.answers(model, params, [PROMPT] * ROWS, requests, k=3, positions=32, max_new_tokens=4)
    assert int(state.accepted.sum()) > 20, "no draft was accepted: the test proves nothing"
    assert np.array_equal(state.known - state.prompt, 1 + state.steps + state.accepted.sum(axis=1))
    begin = np.bincount([answer[0] for answer in answers]).argmax()
    pairs = np.array([[*answer[1:3], 0][:2] for answer in answers if answer[0] == begin])
    expected = law(dataclasses.replace(request, seed=0), (int(begin),)).reshape(-1)
    counts = np.bincount(pairs @ [V, 1], minlength=V * V)
    assert counts[expected == 0].sum() == 0
    often = expected * len(pairs) >= 5
    lump = lambda x: np.append(x[often], x[~often].sum())
    assert often.sum() >= 5 and trees.p_value(lump(counts), lump(expected)) > P_VALUE


@pytest.mark.parametrize(
    "name", ["sequential", "ngram", *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)]
)
def test_answers_are_drawn_from_the_target(name):
    check(*make(name), REQUEST)


@pytest.mark.slow
def test_answers_are_drawn_from_what_top_k_and_min_p_leave():
    check(*make("sequential"), dataclasses.replace(REQUEST, top_k=9, min_p=0.02, temperature=2.0))


@pytest.mark.parametrize("name", ["sequential", "ngram"])
def test_greedy_answers_are_the_exact_ones(name):
    model, params = make(name)
    exact = dataclasses.replace(model, verification=Verification())
    requests = [test_decode.GREEDY] * len(test_decode.PROMPTS)
    answers = [tiny.answers(m, params, test_decode.PROMPTS, requests, k=3) for m in (model, exact)]
    assert answers[0][0] == answers[1][0]
    assert np.array_equal(answers[0][1].accepted, answers[1][1].accepted)


def test_every_pass_and_request_has_noise_of_its_own():
    """The same seed says the same again; another one, and a later pass, draw other drafts."""
    model, params = make("sequential")
    requests = [dataclasses.replace(REQUEST, seed=seed, max_new_tokens=12) for seed in (1, 1, 2)]
    (first, again, other), _ = tiny.answers(model, params, [PROMPT] * 3, requests, k=3)
    assert first == again != other
    state = by_hand.admit(by_hand.empty(model, 1, drafts=3), 0, PROMPT, requests[0])
    drawn = []
    while not bool(state.done.all()):
        state = by_hand.step(model, params, state, size=4, chunk=4)
        drawn.append(tuple(np.asarray(state.drafts[0]).tolist()))
    assert by_hand.answer(state, 0) == first and len(set(drawn)) > 3


def test_what_is_not_finite_ends_a_chain():
    model, params = make("with lookup")
    state = by_hand.admit(by_hand.empty(model, 1, drafts=3), 0, PROMPT, dataclasses.replace(REQUEST, max_new_tokens=9))
    state = by_hand.step(model, params, state, size=8, chunk=8)
    state = state._replace(drafts=jnp.array([[7, 4, 9]]), confidence=jnp.full((1, 3), 0.9))
    state = state._replace(drawn_from=jax.nn.one_hot(state.drafts, V))
    flat = allocate(state, 4)
    wanted = jax.nn.one_hot(jnp.array([7, 4, 9, 2]), V) * 90  # the target wants each draft
    judge = jax.jit(lambda hidden: verify(hidden, flat, state, jnp.eye(V)))
    assert judge(wanted).tokens.tolist() == [[7, 4, 9, 2]] and int(judge(wanted).accepted[0]) == 3
    for place in range(4):
        verdict = judge(wanted.at[place, 5].set(jnp.nan))
        assert int(verdict.accepted[0]) == place
        assert int(verdict.token[0]) == int(verdict.tokens[0, place]) == BROKEN
        assert verdict.tokens[0, :place].tolist() == [7, 4, 9][:place]


def test_nothing_of_it_is_in_the_state_of_exact_verification():
    model, _ = tiny.make(HEAD)
    assert by_hand.empty(model, 1, drafts=3).drawn_from is None
    plain, _ = tiny.make(None, verification=Verification(BLOCK))
    assert by_hand.empty(plain, 1, drafts=0).drawn_from is None, "without a drafter there is nothing to verify"


def test_names_are_known_and_say_what_they_keep():
    with pytest.raises(UserError, match="unknown verification 'lossless': it must be one of exact, "):
        Verification("lossless")
    with pytest.raises(UserError, match="the engine has no verification but the exact one"):
        Verification(BLOCK).require_exact("the engine")
    assert "distribution" in BLOCK and "distribution" in Verification(BLOCK).promise
