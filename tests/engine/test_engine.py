"""The engine on the tiny model: the right tokens in every company, nothing lost, nothing compiled under load."""

import concurrent.futures
import dataclasses
import json
import time

import jax
import numpy as np
import pytest

from specformer_jax.batch import generation
from specformer_jax.config import SamplingParams, Shape
from specformer_jax.decoding import processors, sampling
from specformer_jax.engine import Engine, answer_prompt_file, compiled_steps
from specformer_jax.engine.compiled_steps import Admission, CompiledSteps
from specformer_jax.engine.request import Failed, Request, Stopped
from specformer_jax.errors import UserError
from specformer_jax.planning.budgets import StepBudget
from tests import tiny
from tests.engine import tiny_lm
from tests.engine.tiny_engine import CONFIG, ENDLESS, KINDS, LONG, PAGE, PROMPTS, expected, held, ids, wait_idle


def test_the_endless_request_is_long():
    assert len(expected(ENDLESS.prompt_ids, ENDLESS.sampling_params)) > 40


def test_same_tokens_in_any_company_at_any_budget_and_with_any_prefix(engine):
    asked = []
    for i in range(24):
        prompt, params = PROMPTS[i % 6], KINDS[i % 4]
        speculative = ("auto", "off", 1, 2)[i // 6]
        asked.append((Request(prompt, params, speculative, logprobs=2 if i % 5 == 0 else None), i))
    handles = [engine.submit(request) for request, _ in asked]
    cached = 0
    for (request, i), handle in zip(asked, handles, strict=True):
        deltas = list(handle)
        answer = expected(request.prompt_ids, request.sampling_params)
        assert [token.id for delta in deltas for token in delta.tokens] == answer, i
        assert deltas[-1].finish_reason == ("stop" if answer[-1] == 3 else "length")
        usage = deltas[-1].usage
        assert usage.completion_tokens == len(answer)
        assert usage.completion_tokens == 1 + usage.steps + sum(usage.accepted_per_position)
        assert usage.drafted_tokens <= usage.steps * {"auto": 3, "off": 0}.get(request.speculative, request.speculative)
        assert all(accepted == 0 for accepted in usage.accepted_per_position[2 if request.speculative == 2 else 3 :])
        cached += usage.cached_tokens
    assert cached > 0, "no prefix was reused: the test proves nothing"
    assert engine.stats().accepted_tokens > 0, "no draft was right: the test proves nothing"
    wait_idle(engine)


def test_alone_is_as_among_others(engine):
    for prompt, params in zip(PROMPTS, [*KINDS, *KINDS], strict=False):
        assert ids(engine.submit(Request(prompt, params))) == expected(prompt, params)


def test_bias_and_penalties_in_any_company(engine):
    """Beside requests that ask for nothing, with any drafts, with their first tokens read again after others'."""
    plain = SamplingParams(temperature=1.0, seed=3, max_new_tokens=20)
    kinds = [
        plain,
        dataclasses.replace(plain, logit_bias=((5, 1.5),), presence_penalty=0.5),
        dataclasses.replace(plain, repetition_penalty=1.3, frequency_penalty=0.2),
        dataclasses.replace(plain, temperature=0.0, frequency_penalty=0.6),
    ]
    asked = [Request(PROMPTS[i % 6], kinds[i % 4], ("auto", "off", 2)[i % 3]) for i in range(24)]
    for request, handle in zip(asked, [engine.submit(request) for request in asked], strict=True):
        assert ids(handle) == expected(request.prompt_ids, request.sampling_params)
    wait_idle(engine)


def test_a_reused_prefix_is_as_good_as_one_that_was_read(engine):
    """Every layer of the cache is what reading the whole prompt makes it, the head's with the right next tokens."""
    whole = tuple(np.random.default_rng(5).integers(4, 13, 50).tolist())
    other = 4 + (whole[48] - 3) % 9
    asked = {(*whole[:49], 1): 48, (*whole[:40], 1): 32, (*whole[:48], other, 1): 32}  # the last differs after a page

    def read(prompt):
        """How many tokens were cached, and the keys and values of every layer in the prompt's full pages."""
        [*deltas] = engine.submit(Request(prompt, KINDS[3]))
        wait_idle(engine)
        [pool] = engine._scheduler._pools
        pages = pool.find(pool.chain(prompt))
        cache = np.stack([np.asarray(x)[pages] for x in jax.tree.leaves(engine._scheduler._state.cache)])
        return deltas[-1].usage.cached_tokens, cache

    def forget():
        engine._scheduler._pools[0].__init__(range(engine.compiled_steps.pages), PAGE)

    fresh = []
    for prompt in asked:
        forget()
        cached, cache = read(prompt)
        assert cached == 0 and cache.shape[1] == len(prompt) // PAGE
        fresh.append(cache)
    forget()
    read(whole)
    for (prompt, shared), expected_cache in zip(asked.items(), fresh, strict=True):
        cached, cache = read(prompt)
        assert cached == shared
        assert np.abs(cache - expected_cache).max() < 1e-4


def test_what_was_drafted_is_told(engine):
    [*deltas] = engine.submit(dataclasses.replace(ENDLESS, speculative=3))
    tokens = [token for delta in deltas for token in delta.tokens]
    flags = [token.from_draft for token in tokens]
    assert any(flags) and not flags[0]
    # Each pass ends with the target's own token, so the others are the accepted drafts.
    assert sum(not flag for flag in flags[1:]) in (deltas[-1].usage.steps, deltas[-1].usage.steps - 1)
    assert "".join(delta.text for delta in deltas) == engine.lm.tokenizer.decode([token.id for token in tokens])


def test_logprobs_are_of_the_raw_logits(engine):
    request = Request(PROMPTS[0], KINDS[2], logprobs=3)
    so_far = list(request.prompt_ids)
    for delta in engine.submit(request):
        for token in delta.tokens:
            logits = tiny.next_logits(engine.lm.model, engine.lm.params, so_far)
            logprobs = logits - np.logaddexp.reduce(logits)
            assert token.logprob == pytest.approx(logprobs[token.id], abs=1e-3)
            assert [id for id, _ in token.top] == np.argsort(-logprobs)[:3].tolist()
            assert [value for _, value in token.top] == pytest.approx(np.sort(logprobs)[::-1][:3], abs=1e-3)
            so_far.append(token.id)


def test_the_tokens_of_prompts_are_scored(engine):
    """Prompts of one token and of several chunks, beside others that are not scored, whatever the cache holds."""
    list(engine.submit(Request(LONG, KINDS[0])))
    requests = [
        Request(prompt, KINDS[i % 4], logprobs=i % 3 if i % 4 else None, prompt_logprobs=i % 4 > 0)
        for i, prompt in enumerate([*PROMPTS, *PROMPTS])
    ]
    handles = [engine.submit(request) for request in requests]
    for request, handle in zip(requests, handles, strict=True):
        deltas = list(handle)
        answer = [token.id for delta in deltas for token in delta.tokens]
        assert answer == expected(request.prompt_ids, request.sampling_params)
        found = [token for delta in deltas for token in delta.prompt]
        if not request.prompt_logprobs:
            assert not found
            continue
        assert deltas[0].prompt and deltas[0].tokens and deltas[-1].usage.cached_tokens == 0
        assert tuple(token.id for token in found) == request.prompt_ids
        assert "".join(token.text for token in found) == engine.lm.tokenizer.decode(request.prompt_ids)
        assert (found[0].logprob, found[0].top) == (None, ())
        for i, token in enumerate(found[1:], 1):
            logits = tiny.next_logits(engine.lm.model, engine.lm.params, list(request.prompt_ids[:i]))
            logprobs = logits - np.logaddexp.reduce(logits)
            assert token.logprob == pytest.approx(logprobs[token.id], abs=1e-3)
            assert [id for id, _ in token.top] == np.argsort(-logprobs)[: request.logprobs].tolist()
    wait_idle(engine)
    with pytest.raises(UserError, match="prompt_logprobs needs logprobs"):
        Request((5,), prompt_logprobs=True)


def test_nothing_compiles_under_load(engine):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: compiled.append(event))
    jax.jit(lambda x: x + 17.5)(1.0)
    assert any("compile" in event for event in compiled), "compilations are not seen"
    compiled.clear()
    handles = [
        engine.submit(Request(prompt, params, logprobs=i % 3, prompt_logprobs=i % 2 == 0))
        for i, prompt in enumerate(PROMPTS)
        for params in KINDS
    ]
    handles[3].cancel()
    for handle in handles:
        list(handle)
    list(engine.submit(ENDLESS))
    assert not [event for event in compiled if "compile" in event]


@pytest.mark.parametrize("chunk", [0, 16])
def test_a_call_updates_the_state_in_place(lm, chunk):
    """The donated state aliases the result, and no copy of the cache is among the temporaries."""
    steps = CompiledSteps(lm.model, lm.params, budgets=[StepBudget(20, chunk)], rows=4, context=76, pages=4096, steps=2)
    state = jax.eval_shape(steps.empty)
    lowered = compiled_steps.jit_advance.lower(
        lm.model, lm.params, state, steps.control(), np.int32(1), budget=steps.budgets[0], width=steps.width
    )
    check_in_place(lowered, state)


def test_admitting_updates_the_state_in_place(lm):
    steps = CompiledSteps(lm.model, lm.params, budgets=[StepBudget(20, 16)], rows=4, context=76, pages=4096, steps=2)
    state = jax.eval_shape(steps.empty)
    sampled = jax.tree.map(
        lambda x: np.asarray(x)[0], sampling.stack(KINDS[:1])._replace(processors=processors.stack(KINDS[:1]))
    )
    new = Admission(np.zeros(76, np.int32), *[np.int32(1)] * 5, sampled, np.bool_(False), np.bool_(False))
    check_in_place(compiled_steps.jit_admit.lower(state, np.int32(0), new), state)


def check_in_place(lowered, state):
    memory = lowered.compile().memory_analysis()
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 2


def test_mistakes_are_named(engine):
    for request, message in (
        (Request((5,) * 76), "the prompt has 76 tokens, but the context holds 76"),
        (Request((13,)), "not within the vocabulary of 13"),
        (Request((5,), speculative=4), "draft length 4 is out of range"),
        (Request((5,), logprobs=14), "logprobs 14 is more than the 13"),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit(request)
    with pytest.raises(UserError, match="max_context 300 is more than the 256"):
        Engine(engine.lm, dataclasses.replace(CONFIG, max_context=300))
    with pytest.raises(UserError, match="the largest more than the 4 rows"):
        Engine(engine.lm, dataclasses.replace(CONFIG, budgets=(1, 4)))
    with pytest.raises(UserError, match="cache_positions 0 must be at least 1"):
        dataclasses.replace(CONFIG, cache_positions=0)


def test_a_file_of_prompts_and_its_resumption(engine, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"id": "x", "prompt": "fbcl"}\n{"id": "y", "turns": ["e", "ee"]}\n{"id": "z", "prompt": "%s"}\n' % ("f" * 80)
    )
    assert answer_prompt_file(engine, source, output, sampling_params=KINDS[0], raw=True) == 4
    rows = read_rows(output)
    assert rows["x", 0]["token_ids"] == expected((5, 1, 2, 11), KINDS[0])
    second = (4, *engine.lm.tokenizer.encode(rows["y", 0]["text"]), 4, 4)
    assert rows["y", 1]["token_ids"] == expected(second, KINDS[0])
    assert "80 tokens" in rows["z", 0]["error"]
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:2]) + lines[2][:10])  # killed while it wrote the third
    answered = sum("error" not in json.loads(line) for line in lines[:2])  # what failed is asked again
    assert answer_prompt_file(engine, source, output, sampling_params=KINDS[0], raw=True, resume=True) == 4 - answered
    assert {key: row["token_ids"] for key, row in read_rows(output).items()} == {
        key: row["token_ids"] for key, row in rows.items()
    }


def test_a_stop_while_a_file_is_answered_is_not_its_end(lm, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": name, "turns": ["fbcl", "e"]}) + "\n" for name in "xy"))
    with concurrent.futures.ThreadPoolExecutor() as threads, Engine(lm, CONFIG) as engine, held(engine):
        active = threads.submit(answer_prompt_file, engine, source, output, sampling_params=KINDS[0], raw=True)
        while engine.stats().running + engine.stats().queued < 3:
            time.sleep(0.005)
        threads.submit(engine.stop)
        while engine._stop_at is None:
            time.sleep(0.005)
    with pytest.raises(Stopped, match="asks for what is missing"):
        active.result()
    with Engine(lm, CONFIG) as engine:
        written = len(output.read_text().splitlines())
        assert (
            answer_prompt_file(engine, source, output, sampling_params=KINDS[0], raw=True, resume=True)
            == 4 - written
            > 0
        )


def test_a_file_is_not_taken_for_answered_by_an_engine_that_cannot_go_on(lm, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": str(i), "turns": ["fbcl", "e"]}) + "\n" for i in range(12)))
    with Engine(lm, CONFIG) as engine:

        def fail(*_):
            raise RuntimeError("the device has gone")

        engine.compiled_steps.advance = engine.compiled_steps.empty = fail
        with pytest.raises(Failed, match="asks for what is missing"):
            answer_prompt_file(engine, source, output, sampling_params=KINDS[0], raw=True)
    assert all("error" in row for row in read_rows(output).values())
    with Engine(lm, CONFIG) as engine:
        answer_prompt_file(engine, source, output, sampling_params=KINDS[0], raw=True, resume=True)
    rows = read_rows(output)
    assert len(rows) == 24 and all(row["token_ids"] for row in rows.values())


def read_rows(output):
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    found = {(row["id"], row.get("turn", 0)): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_a_turn_is_not_asked_after_one_that_failed(engine, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": "y", "turns": ["e", "ee"]}\n')
    advance = engine.compiled_steps.advance

    def fail(*_):
        engine.compiled_steps.advance = advance
        raise RuntimeError("the device has gone")

    engine.compiled_steps.advance = fail
    assert answer_prompt_file(engine, source, output, sampling_params=KINDS[0], raw=True) == 2
    failed = read_rows(output)
    assert "the device has gone" in failed["y", 0]["error"] and "turn 0 has no answer" in failed["y", 1]["error"]
    assert answer_prompt_file(engine, source, output, sampling_params=KINDS[0], raw=True, resume=True) == 2
    rows = read_rows(output)
    assert rows["y", 0]["token_ids"] == expected((4,), KINDS[0]) and "error" not in rows["y", 1]


@pytest.mark.slow
def test_200_mixed_requests_as_generate_answers_them(lm):
    """Against `generation.generate_ids`, one call for each kind of sampling, among 64 others in 8 rows."""
    random = np.random.default_rng(1)
    config = dataclasses.replace(CONFIG, rows=8, max_queue=200, budgets=None)
    requests = []
    for i in range(200):
        shared = LONG[: int(random.integers(0, 40))] if i % 2 else ()
        own = random.integers(4, 13, int(random.integers(1, 12))).tolist()
        params = dataclasses.replace(KINDS[i % 4], seed=int(random.integers(2**32)), max_new_tokens=1 + i % 24)
        requests.append(Request((*shared, *own), params, speculative=("auto", "off", 1, 3)[i // 50]))
    with Engine(lm, config, tiny_lm.Cycle()) as engine:
        handles = [engine.submit(request) for request in requests]
        got = [ids(handle) for handle in handles]
        assert engine.stats().cached_tokens > 0 and engine.stats().accepted_tokens > 0
    for request, answer in zip(requests, got, strict=True):
        [(_, reference)] = generation.generate_ids(
            lm, [request.prompt_ids], request.sampling_params, draft_length=2, shape=Shape(4, 4, 16, 80)
        )
        assert answer == reference.token_ids
