"""Answer files lose nothing; prompts that are to be answered one and all are checked when they are read."""

import json

import pytest

from specformer_jax.batch import prompt_files
from specformer_jax.batch.conversations import Conversation
from specformer_jax.errors import UserError


def test_a_row_that_cannot_be_answered_whole_is_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    for line, message in (('{"prompt": ""}', "an empty message"), ('{"turns": ["a", 3]}', "a message that is no text")):
        path.write_text('{"prompt": "fine"}\n' + line)
        with pytest.raises(UserError, match=f"line 2: {message}, which cannot be answered"):
            prompt_files.read_prompts(path)
    path.write_text('{"id": "a", "turns": ["b", "c"]}')
    assert prompt_files.read_prompts(path, "Be brief.") == [Conversation("a", ("b", "c"), "Be brief.", (None, None))]


def test_an_answer_file_is_not_overwritten(tmp_path):
    path = tmp_path / "out.jsonl"
    file = prompt_files.AnswerFile(path, resume=False)
    file.write({"id": "1", "text": "a"})
    with pytest.raises(UserError, match="--resume"):
        prompt_files.AnswerFile(path, resume=False)


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_a_torn_last_row_is_cut_off_and_the_rest_kept(tmp_path, cut):
    """Whatever byte a killed run stopped at, resuming sees exactly the whole rows."""
    path = tmp_path / "out.jsonl"
    rows = [{"id": "1", "text": "é\u2028a"}, {"id": "2", "turn": 1, "text": "b"}]
    file = prompt_files.AnswerFile(path, resume=False)
    for row in rows:
        file.write(row)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    resumed = prompt_files.AnswerFile(path, resume=True)
    kept = path.read_bytes()
    assert whole.startswith(kept) and kept.count(b"\n") == len(resumed.done)
    for row in rows:
        if (row["id"], row.get("turn", 0)) not in resumed.done:
            resumed.write(row)
    assert path.read_bytes() == whole


def test_a_file_of_something_else_is_not_resumed(tmp_path):
    path = tmp_path / "out.jsonl"
    for content in (
        "notes\n",
        '{"id": "1", "prompt": "a prompt file"}\n{"id": "2", "prompt": "whose last line is open"}',
    ):
        path.write_text(content)
        with pytest.raises(UserError, match="line 1: no answer row"):
            prompt_files.AnswerFile(path, resume=True)
        assert path.read_text() == content


def test_rounds_ask_a_turn_after_the_one_before():
    one, two = Conversation("a", ("x",)), Conversation("b", ("y", "z"))
    assert list(prompt_files.rounds([one, two])) == [(0, [one, two]), (1, [two])]


def test_rows_are_json_lines(tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    file = prompt_files.AnswerFile(path, resume=False)
    file.write({"id": "1", "text": "two\nlines"})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"id": "1", "text": "two\nlines"}]
