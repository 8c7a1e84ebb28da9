"""OpenAI's batch files: a row's answer is what HTTP would answer, and a file that a kill cut is resumed."""

import json

import pytest

from specformer_jax.engine.request import QueueFull, Stopped
from specformer_jax.errors import UserError
from specformer_jax.server.batch_file import answer_batch, open_output, read_batch
from specformer_jax.server.service import Service
from tests.server.wire.scripted import ScriptedEngine

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "a"}], "seed": 1}
ROWS = [
    {"custom_id": "chat", "url": "/v1/chat/completions", "body": CHAT},
    {"custom_id": "text", "url": "/v1/completions", "body": {"model": "scripted", "prompt": ["a", "b"]}},
    {"custom_id": "items", "url": "/v1/responses", "body": {"model": "scripted", "input": "a"}},
    {"custom_id": "wrong", "url": "/v1/completions", "body": {"model": "scripted", "prompt": "a", "max_tokens": -1}},
    {"custom_id": "other", "url": "/v1/completions", "body": {"model": "gpt", "prompt": "a"}},
    {"custom_id": "stream", "url": "/v1/chat/completions", "body": CHAT | {"stream": True}},
    {"custom_id": "long", "url": "/v1/completions", "body": {"model": "scripted", "prompt": "a" * 5000}},
]


@pytest.fixture
def engine():
    engine = ScriptedEngine()
    engine.text = "so it is"
    return engine


@pytest.fixture
def run(engine, tmp_path):
    """Answers rows, or a file of them, into out.jsonl; what was written by custom_id, and what `answer_batch` says."""

    def run(rows=ROWS, resume=False, target_name="scripted"):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(json.dumps({"method": "POST"} | row) + "\n" for row in rows))
        asked = read_batch(source)
        output = open_output(target, asked, {"target": target_name}, resume=resume)
        counts = answer_batch(Service(engine, (), {}), asked, output)
        lines = [json.loads(line) for line in target.read_text().splitlines()]
        assert len({line["custom_id"] for line in lines}) == len(lines)
        return {line["custom_id"]: line["response"] for line in lines}, counts

    return run


def test_a_row_says_what_its_answer_looks_like(run, engine):
    run([ROWS[0] | {"body": CHAT | {"structured_outputs": {"choice": ["yes", "no"]}}}])
    assert engine.requests[-1].grammar is not None


def test_rows_are_answered_as_over_http(run):
    answers, counts = run()
    assert counts == (7, 4)
    assert answers["chat"]["body"]["choices"][0]["message"]["content"] == "so it is"
    assert [choice["text"] for choice in answers["text"]["body"]["choices"]] == ["so it is"] * 2
    assert answers["items"]["body"]["output"][0]["content"][0]["text"] == "so it is"
    errors = {name: answer["body"]["error"] for name, answer in answers.items() if answer["status_code"] != 200}
    assert {name: answers[name]["status_code"] for name in errors} == {
        "wrong": 400,
        "other": 404,
        "stream": 400,
        "long": 400,
    }
    assert errors["wrong"]["param"] == "max_tokens" and errors["long"]["code"] == "context_length_exceeded"


def test_a_batch_is_resumed(run, engine, tmp_path):
    answers, _ = run()
    output = tmp_path / "out.jsonl"
    whole = output.read_text().splitlines(keepends=True)
    engine.requests.clear()
    assert run(resume=True)[1] == (4, 4), "what failed is asked again, and nothing else"
    assert not engine.requests
    done = [line for line in whole if json.loads(line)["custom_id"] == "chat"]
    output.write_text(done[0] + whole[0][:40])  # killed while it wrote
    again, counts = run(resume=True)
    assert counts == (6, 4) and again["chat"] == answers["chat"] and again.keys() == answers.keys()
    with pytest.raises(UserError, match="is there already"):
        run()


def test_other_answers_are_not_gone_on_with(run, tmp_path):
    """As where a row was changed or left out, the target is another, or somebody edited an answer."""
    run(ROWS[:2])
    changed = [ROWS[0] | {"body": CHAT | {"seed": 2}}, ROWS[1]]
    with pytest.raises(UserError, match="answers /v1/chat/completions .* in row 'chat', where the prompts ask /v1/"):
        run(changed, resume=True)
    with pytest.raises(UserError, match="in row 'text', where the prompts have nothing"):
        run(ROWS[:1], resume=True)
    with pytest.raises(UserError, match="holds answers made with target scripted, not another"):
        run(ROWS[:2], resume=True, target_name="another")
    output = tmp_path / "out.jsonl"
    output.write_text(output.read_text().replace("so it is", "so it was", 1))
    with pytest.raises(UserError, match="line 1 is not what was written there"):
        run(ROWS[:2], resume=True)


@pytest.mark.parametrize(
    "rows, sentence",
    [
        ([{"url": "/v1/completions", "body": {}}], 'line 1: give a row its "custom_id"'),
        ([ROWS[0], ROWS[0]], "line 2: the custom_id 'chat' stands there for the second time"),
        ([ROWS[0] | {"url": "/v1/embeddings"}], 'line 1: its "method" must be "POST" and its "url" one of'),
        ([ROWS[0] | {"body": "x"}], 'its "body", an object'),
        ([ROWS[0] | {"custom_id": "\ud800"}], "no Unicode"),
        ([], "holds no requests"),
    ],
)
def test_rows_that_are_none(run, rows, sentence):
    with pytest.raises(UserError, match=sentence):
        run(rows)


def test_a_file_of_something_else_is_not_resumed(tmp_path):
    (tmp_path / "out.jsonl").write_text('{"id": "x", "text": "an answer of generate"}\n')
    with pytest.raises(UserError, match="line 1: no answer row"):
        open_output(tmp_path / "out.jsonl", [], {}, resume=True)


def test_a_full_queue_is_waited_for_and_a_stopped_engine_ends_the_run(run, engine, monkeypatch):
    submit, refused = engine.submit, []

    def full_once(request):
        if not refused:
            refused.append(request)
            raise QueueFull(0.01)
        return submit(request)

    monkeypatch.setattr(engine, "submit", full_once)
    assert run(ROWS[:3])[1] == (3, 0) and refused

    def stopped(request):
        raise Stopped("over")

    monkeypatch.setattr(engine, "submit", stopped)
    with pytest.raises(Stopped):
        run([*ROWS[:3], ROWS[0] | {"custom_id": "new"}], resume=True)
