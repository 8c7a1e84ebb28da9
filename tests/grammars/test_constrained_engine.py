"""Answers that follow a grammar: those of plain decoding, with any drafts, in any company, and wherever they were."""

import dataclasses

import pytest

from specformer_jax.config import SamplingParams
from specformer_jax.engine import Engine
from specformer_jax.engine.request import Request
from specformer_jax.errors import UserError
from specformer_jax.grammars import grammar
from tests.engine import tiny_lm
from tests.engine.tiny_engine import CONFIG, KINDS, PAGE, PROMPTS, expected, ids, wait_idle
from tests.grammars.automata import AUTOMATA, naive, several

SAMPLED = [*KINDS[:3], SamplingParams(1.0, seed=9, max_new_tokens=20, repetition_penalty=1.3, logit_bias=((2, 1.0),))]


@pytest.fixture(scope="module")
def answers(lm):
    """What plain decoding answers to each prompt, with each grammar and sampling."""
    return {
        (prompt, params, number): naive(lm, prompt, params, automaton)
        for prompt, params in zip(PROMPTS, [*SAMPLED, *SAMPLED], strict=False)
        for number, automaton in enumerate(AUTOMATA)
    }


def test_the_answers_are_worth_comparing(answers):
    assert len({tuple(answer) for answer in answers.values()}) > 8
    assert any(len(answer) > 6 for answer in answers.values())


@pytest.mark.parametrize("speculative", ["auto", "off", 1])
def test_alone(engine, answers, speculative):
    for (prompt, params, number), answer in answers.items():
        request = Request(prompt, params, speculative, grammar=AUTOMATA[number].grammar)
        assert ids(engine.submit(request)) == answer, (prompt, number)


def test_beside_each_other_and_beside_others(engine, answers):
    handles = {}
    for n, key in enumerate(answers):
        prompt, params, number = key
        handles[key] = engine.submit(Request(prompt, params, grammar=AUTOMATA[number].grammar))
        handles[n] = engine.submit(Request(prompt, params))
    for key, handle in handles.items():
        if isinstance(key, tuple):
            assert ids(handle) == answers[key]
        else:
            assert ids(handle) == expected(*list(answers)[key][:2])
    wait_idle(engine)


def test_what_is_forced_is_drafted(engine, lm):
    """Whatever the head proposes: all but the first letter of a choice is known before it is read."""
    word = "abcefghijklmabcefghijklm"
    handle = engine.submit(Request((5,), SamplingParams(max_new_tokens=40), grammar=grammar.of_choice([word])))
    tokens = [token for delta in handle for token in delta.tokens]
    assert "".join(token.text for token in tokens) == word
    assert sum(token.from_draft for token in tokens) >= len(tokens) // 2


def test_a_preempted_answer_goes_on_in_its_grammar(lm):
    """Six pages for four rows that want four each in the end."""
    config = dataclasses.replace(CONFIG, cache_positions=6 * PAGE)
    long = several(38, 44)
    asked = [dataclasses.replace(params, max_new_tokens=50) for params in SAMPLED]
    with Engine(lm, config, tiny_lm.Cycle()) as engine:
        handles = [engine.submit(Request(PROMPTS[3], params, grammar=long.grammar)) for params in asked]
        for params, handle in zip(asked, handles, strict=True):
            assert ids(handle) == naive(lm, PROMPTS[3], params, long)
        wait_idle(engine)
        assert engine.stats().preempted > 0


def test_what_is_no_grammar_is_refused_before_anything_runs(engine):
    for text, message in (
        (grammar.of_regex("(("), "the grammar cannot be followed: .*invalid regex"),
        (grammar.of_json_schema({"type": "what"}), "Invalid type: what"),
        (grammar.of_json_schema({"not": {}}), "Unimplemented keys"),
        (grammar.of_json_schema({"type": "string", "minLength": 3, "maxLength": 1}), "Unsatisfiable"),
        (grammar.of_json_schema(False), "cannot be followed"),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit(Request((5,), grammar=text))
    for make in (
        lambda: grammar.of_rules("nonsense ("),
        lambda: grammar.of_choice([]),
        lambda: grammar.of_choice(["a", ""]),
        lambda: grammar.of_json_schema("{"),
        lambda: grammar.of_json_schema("[1]"),
        lambda: Request((5,), min_tokens=3, grammar="x"),
        lambda: Request((5,), ignore_eos=True, grammar="x"),
    ):
        with pytest.raises(UserError):
            make()
    assert engine.stats().running == 0
