"""What ends a request of the engine: stop strings and tokens, cancelling, deadlines, mishaps, stopping."""

import dataclasses
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specformer_jax.engine import Engine
from specformer_jax.engine.request import NOT_NUMBERS, Failed, Request, Stopped
from specformer_jax.engine.stops import FinalText
from tests.engine import tiny_lm
from tests.engine.tiny_engine import CONFIG, ENDLESS, KINDS, PROMPTS, expected, held, ids, wait_idle

SEVERAL_ENDS = dataclasses.replace(ENDLESS.sampling_params, seed=1)  # samples the end token again and again


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("ab#", max_size=3), max_size=12),
    stops=st.lists(st.text("ab#", min_size=1, max_size=3), max_size=3),
)
def test_text_before_a_stop_string_is_the_same_in_any_pieces(pieces, stops):
    class Pieces:
        def __init__(self):
            self.out = iter(pieces)

        def push(self, ids):
            return next(self.out)

        def finish(self):
            return ""

    text, got = FinalText(Pieces(), stops), ""
    for i in range(len(pieces)):
        got += text.push(i)
        if text.stopped:
            break
    got += text.finish()
    whole = "".join(pieces)
    places = [(whole.index(stop) + len(stop), whole.index(stop)) for stop in stops if stop in whole]
    assert text.stopped == bool(places)
    assert got == whole[: min(places)[1] if places else len(whole)]


def test_bytes_held_back_after_a_stop_string_are_no_part_of_the_answer():
    class Torn:
        def push(self, ids):
            return "a b"

        def finish(self):
            return "\ufffd"  # the first byte of a character whose others never came

    text = FinalText(Torn(), [" "])
    assert text.push(0) + text.finish() == "a" and text.stopped


def test_stop_strings_across_tokens_end_the_answer(engine):
    answer = expected(ENDLESS.prompt_ids, ENDLESS.sampling_params)
    whole = engine.lm.tokenizer.decode(answer)
    stop = next(whole[i : i + 3] for i in range(8, 40) if whole.index(whole[i : i + 3]) == i)
    [*deltas] = engine.submit(dataclasses.replace(ENDLESS, stop=(stop, "zzz")))
    assert "".join(delta.text for delta in deltas) == whole[: whole.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].usage.completion_tokens == whole.index(stop) + 3
    wait_idle(engine)


def test_stop_tokens_end_the_answer(engine):
    answer = expected(ENDLESS.prompt_ids, ENDLESS.sampling_params)
    token = next(token for i, token in enumerate(answer) if i > 6 and answer.index(token) == i)
    [*deltas] = engine.submit(dataclasses.replace(ENDLESS, stop_token_ids=(token,)))
    got = [t.id for delta in deltas for t in delta.tokens]
    assert got == answer[: answer.index(token) + 1] and deltas[-1].finish_reason == "stop"
    assert "".join(delta.text for delta in deltas) == engine.lm.tokenizer.decode(got[:-1])


def test_end_tokens_can_be_ignored(engine):
    """The answer goes on as plain decoding would, with drafts and beside others, to its limit."""
    [eos] = engine.lm.config.eos_ids
    request = dataclasses.replace(ENDLESS, sampling_params=SEVERAL_ENDS, ignore_eos=True)
    wanted: list[int] = []
    while len(wanted) < request.sampling_params.max_new_tokens:
        rest = dataclasses.replace(request.sampling_params, max_new_tokens=73 - len(wanted))
        wanted += tiny_lm.naive(engine.lm, (*request.prompt_ids, *wanted), rest)
    assert wanted.count(eos) > 1
    answers = [list(handle) for handle in [engine.submit(request) for _ in range(6)]]
    for deltas in answers:
        assert [t.id for delta in deltas for t in delta.tokens] == wanted
        assert deltas[-1].finish_reason == "length" and deltas[-1].usage.completion_tokens == 73
        assert "".join(delta.text for delta in deltas) == engine.lm.tokenizer.decode(wanted)
    wait_idle(engine)


@pytest.mark.parametrize("least", [0, 1, 9, 30])
def test_an_answer_has_its_least_tokens(engine, least):
    """Until then end and stop tokens are ruled out; what comes after them is as it would be without."""
    [eos] = engine.lm.config.eos_ids
    params, stop = dataclasses.replace(SEVERAL_ENDS, max_new_tokens=40), 6
    wanted: list[int] = []
    while len(wanted) < 40 and not {eos, stop} & {*wanted[-1:]}:
        ruled_out = ((eos, -1e6), (stop, -1e6)) if len(wanted) < least else ()
        step = dataclasses.replace(params, max_new_tokens=1, logit_bias=ruled_out)
        wanted += tiny_lm.naive(engine.lm, (*ENDLESS.prompt_ids, *wanted), step)
    request = dataclasses.replace(ENDLESS, sampling_params=params, min_tokens=least, stop_token_ids=(stop,))
    for handle in [engine.submit(request) for _ in range(6)]:
        assert ids(handle) == wanted
    assert len(wanted) > least
    wait_idle(engine)


def test_logits_that_are_no_numbers_are_said_to_be_none(engine, monkeypatch):
    advance = engine.compiled_steps.advance

    def broken(*arguments):
        state, report, logprobs = advance(*arguments)
        return state, report, logprobs._replace(chosen=logprobs.chosen * float("nan"))

    monkeypatch.setattr(engine.compiled_steps, "advance", broken)
    [*deltas] = engine.submit(dataclasses.replace(ENDLESS, logprobs=1))
    assert (deltas[-1].finish_reason, deltas[-1].error) == ("error", NOT_NUMBERS)
    assert not [t for delta in deltas for t in delta.tokens]
    monkeypatch.undo()
    wait_idle(engine)


def test_an_answer_ends_where_the_context_ends(engine):
    request = Request(ENDLESS.prompt_ids * 22, dataclasses.replace(ENDLESS.sampling_params, max_new_tokens=500, seed=3))
    [*deltas] = engine.submit(request)
    made = deltas[-1].usage.completion_tokens
    assert deltas[-1].finish_reason == "stop" or made == CONFIG.max_context - len(request.prompt_ids)


def test_cancelling_frees_the_row(engine):
    for _ in range(3):
        handles = [engine.submit(ENDLESS) for _ in range(6)]  # more than rows: some are cancelled in the queue
        next(handles[0])
        for handle in handles:
            handle.cancel()
        reasons = {list(handle)[-1].finish_reason for handle in handles}
        assert reasons <= {"cancelled", "length", "stop"} and "cancelled" in reasons
        wait_idle(engine)
    assert ids(engine.submit(Request(PROMPTS[4], KINDS[1]))) == expected(PROMPTS[4], KINDS[1])


def test_deadlines(engine):
    with held(engine):
        waiting = engine.submit(dataclasses.replace(ENDLESS, timeout=0.05))
        queued = [engine.submit(dataclasses.replace(ENDLESS, timeout=0.05)) for _ in range(6)]
        time.sleep(0.1)
    for handle in (waiting, *queued):
        last = list(handle)[-1]
        assert last.finish_reason == "deadline" and last.usage.seconds >= 0.05
    wait_idle(engine)


def test_an_exception_in_a_step_fails_what_is_in_flight_and_nothing_else(engine, caplog):
    advance = engine.compiled_steps.advance

    def fail(*_):
        engine.compiled_steps.advance = advance
        raise RuntimeError("the device has gone")

    engine.compiled_steps.advance = fail
    handles = [engine.submit(ENDLESS) for _ in range(6)]
    answers = [list(handle) for handle in handles]
    failed = [deltas[-1].error for deltas in answers if deltas[-1].finish_reason == "error"]
    assert answers[0][-1].error in failed and all("the device has gone" in error for error in failed)
    assert len(failed) <= CONFIG.rows and "a step failed" in caplog.text
    for deltas in answers[len(failed) :]:  # those that waited
        assert [t.id for delta in deltas for t in delta.tokens] == expected(ENDLESS.prompt_ids, ENDLESS.sampling_params)
    assert engine.stats().healthy
    wait_idle(engine)


def test_an_engine_that_cannot_go_on_says_so(lm, caplog):
    with Engine(lm, CONFIG, tiny_lm.fixed(0)) as engine:

        def fail(*_):
            raise RuntimeError("the device has gone")

        engine.compiled_steps.advance = engine.compiled_steps.empty = fail
        [*deltas] = engine.submit(ENDLESS)
        assert deltas[-1].finish_reason == "error"
        deadline = time.monotonic() + 20
        while engine.stats().healthy:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(Failed, match="could not go on"):
            engine.submit(ENDLESS)


def test_stopping_drains_or_cancels(lm):
    engine = Engine(lm, CONFIG, tiny_lm.Cycle())
    handles = [engine.submit(Request(prompt, KINDS[0])) for prompt in PROMPTS]
    engine.stop(drain_seconds=60)
    assert [ids(handle) for handle in handles] == [expected(prompt, KINDS[0]) for prompt in PROMPTS]
    with pytest.raises(Stopped):
        engine.submit(ENDLESS)
    engine = Engine(lm, CONFIG, tiny_lm.Cycle())
    handles = [engine.submit(ENDLESS) for _ in range(40)]
    engine.stop()
    assert "cancelled" in {list(handle)[-1].finish_reason for handle in handles}
