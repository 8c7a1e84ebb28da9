"""The target answers every turn after its own answers, as `generate` does; nothing is lost, repeated or uncounted."""

from __future__ import annotations

import json
import shutil

import pytest

import serve
import train
from specformer_jax.batch import generation
from specformer_jax.batch.conversations import Conversation
from specformer_jax.config import SamplingParams
from specformer_jax.decoding.pass_counts import PassCounts
from specformer_jax.decoding.state import BROKEN_REASON
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import load
from specformer_jax.training import evaluate
from specformer_jax.training.config import DistillConfig
from specformer_jax.training.data.sources import read_documents
from specformer_jax.training.distillation import distill

DIALOGUES = [
    Conversation("a", ("w5 w6", "w7", "w8 w9 w10"), "w20"),
    Conversation("b", ("w11",)),
    Conversation("c", ("w12 w13", "w14 " * 60, "w15")),
    Conversation("d", ("w16 " * 60, "w15")),
    Conversation("e", ("w17", "w18")),
]
CONFIG = DistillConfig((0.0, 0.8), max_new_tokens=6, max_prompt_tokens=40, batch_size=2, shard_size=3, seed=4)


@pytest.fixture(scope="module")
def target(tiny_target, tmp_path_factory):
    """A template whose later turns begin with the tokens of those before."""
    folder = tmp_path_factory.mktemp("turns") / "target"
    shutil.copytree(tiny_target, folder)
    template = "{% for m in messages %}{{ 'w1 ' if m['role'] == 'user' }}{{ m['content'] }}"
    template += "{{ ' w2 ' if m['role'] == 'user' else ' ' }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def lm(target):
    return load(str(target), draft="none", dtype="float32")


def rows_of(folder):
    return [json.loads(line) for file in sorted(folder.glob("shard*.jsonl")) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_every_turn_is_answered_as_generate_answers_it(lm, tmp_path, capsys):
    written, left_out = distill.distill(lm, DIALOGUES, CONFIG, tmp_path / "a")
    assert "distill: 7 of 7 answers" in capsys.readouterr().err.splitlines()[-1]
    rows = rows_of(tmp_path / "a")
    assert [(row["id"], row.get("turn")) for row in rows] == [
        ("a", None),
        ("a", 1),
        ("a", 2),
        ("b", None),
        ("c", None),
        ("e", None),
        ("e", 1),
    ]
    assert sorted((omission.where, omission.part, omission.count) for omission in left_out) == [
        ("c", "turn", 2),
        ("d", "row", 1),
    ]
    assert all("more than 40 tokens" in omission.reason for omission in left_out)
    assert written == sum(len(row["response_ids"]) for row in rows)
    by_id = {c.id: c for c in DIALOGUES}
    said: dict[str, list[str]] = {}
    for row in rows:
        before = said.setdefault(row["id"], [])
        prompt = generation.encode_turn(lm, by_id[row["id"]], before, raw=False)
        sampling_params = SamplingParams(temperature=row["temperature"], seed=row["seed"], max_new_tokens=6)
        [(_, answer)] = generation.generate_ids(lm, [prompt], sampling_params)
        assert (row["prompt_ids"], row["response_ids"]) == (prompt, answer.token_ids)
        before.append(answer.text)
    assert {row["temperature"] for row in rows} == {0.0, 0.8}
    assert len({row["seed"] for row in rows}) == len(rows)  # no turn takes the noise of another

    # The turns of a dialogue are one document, with a span for each answer.
    documents = {document.id: document for document in read_documents(tmp_path / "a")}
    assert len(documents) == 4 and [len(documents[name].answers) for name in "abce"] == [3, 1, 1, 2]
    for row in rows:
        begin, end = documents[row["id"]].answers[row.get("turn", 0)]
        assert documents[row["id"]].tokens[begin:end].tolist() == row["response_ids"]

    # Killed within a shard, at any answer: what is there is read, and the rest is made as if nothing had happened.
    whole = {file.name: file.read_text() for file in (tmp_path / "a").glob("shard*")}
    lines = whole["shard-00000.jsonl"].splitlines(keepends=True)
    for number, done in enumerate(([], [0], [0, 4, 1], [3, 0, 1, 2])):
        folder = tmp_path / f"b{number}"
        folder.mkdir()
        (folder / "shard-00000.part").write_text("".join(lines[i] for i in done) + lines[-1][:20])
        if done:
            assert sum(len(d.answers) for d in read_documents(folder)) == len(done)
        distill.distill(lm, DIALOGUES, CONFIG, folder, progress=False)
        assert {file.name: file.read_text() for file in folder.glob("shard*")} == whole
    # A run that was killed between the finished shard and the removal of its .part file.
    (tmp_path / "a" / "shard-00000.part").write_text("".join(lines[:2]))
    assert len(read_documents(tmp_path / "a")) == 4

    # More turns are added to a folder that has the first ones; fewer are another run's.
    first = [c.first(1) for c in DIALOGUES]
    distill.distill(lm, first, CONFIG, tmp_path / "c", progress=False)
    assert len(rows_of(tmp_path / "c")) == 4
    distill.distill(lm, DIALOGUES, CONFIG, tmp_path / "c", progress=False)
    assert rows_of(tmp_path / "c") == rows
    with pytest.raises(UserError, match="answers a prompt 'a' that is none of this run's"):
        distill.distill(lm, first, CONFIG, tmp_path / "c")


def command(target, tmp_path, *arguments):
    settings = [f"target={target}", "distill.max_prompt_tokens=40", "distill.max_new_tokens=6", "dtype=float32"]
    changes = [word for setting in settings for word in ("--set", setting)]
    common = ["distill", "--config", "configs/tiny.py", "--draft", "none", "--out", str(tmp_path / "out"), *changes]
    return train.main([*common, *arguments])


def test_the_command_counts_and_lists_what_it_leaves_out(target, tmp_path, capsys):
    prompts = tmp_path / "p.json"
    messages = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    rows = [
        {"id": "a", "messages": [*messages, {"role": "user", "content": "w7"}]},
        {"id": "b", "prompt": ""},
        {"id": "c", "prompt": "w8 " * 60},
        {"id": "d", "messages": [*messages, {"role": "tool", "content": "w7"}]},
    ]
    prompts.write_text(json.dumps(rows))
    assert command(target, tmp_path, "--prompts", str(prompts), "--system", "w20", "--answers", "keep") == 0
    shown = capsys.readouterr().out
    assert "3 dialogues, 3 turns\n" in shown and "left out 1 row: an empty message" in shown
    assert "left out 1 turn of 1 row: not the first (--turns all asks them)" in shown
    assert "left out 1 message of 1 row: a message of the role 'tool'" in shown
    assert "left out 1 row: no answer stands there" in shown
    listed = [json.loads(line) for line in (tmp_path / "out" / "left_out-00000.jsonl").read_text().splitlines()]
    assert {omission["where"].rsplit(", ")[-1] for omission in listed} == {"row 2", "row 4", "a", "c"}
    documents = read_documents(tmp_path / "out")
    assert [document.tokens.tolist() for document in documents] == [[20, 1, 5, 2, 6]] * 2
    assert command(target, tmp_path, "--prompts", str(prompts)) == 2
    assert "made with answers keep, not target: choose another folder" in capsys.readouterr().err


def test_prompts_that_are_all_too_long_are_a_mistake_and_write_nothing(target, tiny_head, tmp_path, capsys):
    prompts, head = tmp_path / "p.jsonl", tmp_path / "head"
    prompts.write_text("".join(json.dumps({"prompt": "w5 " * 600}) + "\n" for _ in range(3)))
    assert command(target, tmp_path, "--prompts", str(prompts)) == 2
    message = "error: there is nothing to answer: every prompt is left out (a prompt of more than 40 tokens"
    assert capsys.readouterr().err.startswith(message)
    shutil.copytree(tiny_head, head)
    before = {file.name: file.read_bytes() for file in head.iterdir()}
    report = tmp_path / "report.json"
    model = ["--target", str(target), "--dtype", "float32"]
    command_line = ["evaluate", *model, "--draft", str(head), "--json", str(report), "--record", "--prompts"]
    assert train.main([*command_line, str(prompts)]) == 2
    assert "none of the prompts in" in capsys.readouterr().err
    output = tmp_path / "answers.jsonl"
    assert serve.main(["generate", *model, "--draft", "none", "--prompts", str(prompts), "--output", str(output)]) == 2
    assert "error: no prompt could be answered: the prompt has" in capsys.readouterr().err
    # Nor is there anything to record of answers that no draft had a place in.
    prompts.write_text('{"prompt": "w5"}')
    assert train.main([*command_line, str(prompts), "--max-new-tokens", "1"]) == 2
    assert "there is nothing to record" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not report.exists()
    assert before == {file.name: file.read_bytes() for file in head.iterdir()}


def test_evaluate_leaves_out_what_the_target_cannot_answer(target, tiny_head, tmp_path, capsys, monkeypatch):
    """A row whose hidden states are not finite has no answer, and its later turns are not asked."""
    asked = []

    def decode(lm, prompts, sampling_params, draft_length, *_):
        asked.append(len(prompts))
        return PassCounts(draft_length), [[] for _ in prompts]

    monkeypatch.setattr(evaluate, "decode", decode)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"turns": ["w5", "w6"]}))
    model = ["--target", str(target), "--draft", str(tiny_head), "--dtype", "float32"]
    assert train.main(["evaluate", *model, "--prompts", str(prompts), "--turns", "all"]) == 2
    assert f"none of the prompts in {prompts} can be answered: {BROKEN_REASON}" in capsys.readouterr().err
    assert asked == [1, 0]


@pytest.mark.slow
def test_evaluate_reads_what_distill_reads(target, tiny_head, tmp_path, capsys):
    prompts, report = tmp_path / "p.json", tmp_path / "report.json"
    said = [{"from": "human", "value": "w5"}, {"from": "gpt", "value": "w6"}, {"from": "human", "value": "w7"}]
    rows = [{"conversations": said}, {"conversations": [*said, {"from": "gpt", "value": "w9"}] * 2}, {"prompt": " "}]
    prompts.write_text(json.dumps(rows))
    model = ["--target", str(target), "--draft", str(tiny_head), "--dtype", "float32", "--max-new-tokens", "8"]
    arguments = ["evaluate", *model, "--prompts", str(prompts), "--system", "w20", "--json", str(report)]
    for flags, answers, left_out in (
        (["--turns", "all"], 6, [("row", 1)]),
        (["--limit", "1"], 1, [("row", 1), ("row", 1), ("turn", 1)]),
    ):
        assert train.main([*arguments, *flags]) == 0
        found = json.loads(report.read_text())
        assert [count["answers"] for count in found["files"]["p.json"]["offline"]] == [answers] * 3
        assert [(kind["part"], kind["count"]) for kind in found["left_out"]["p.json"]] == left_out
        assert found["files"]["p.json"]["offline"][-1] == found["files"]["p.json"]["decoded"][-1]
        assert "left out 1 row: an empty message" in capsys.readouterr().out
