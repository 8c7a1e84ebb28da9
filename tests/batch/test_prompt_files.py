"""Prompt files are checked line by line; answer files lose nothing."""

import json

import pytest

from specformer_jax import files
from specformer_jax.batch import prompt_files
from specformer_jax.errors import UserError


def _file(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_reads_prompts_and_turns(tmp_path):
    path = _file(
        tmp_path, '{"prompt": "a"}', "", '{"question_id": 81, "turns": ["b", "c"]}', '{"id": "x", "prompt": "d"}'
    )
    assert [(c.id, c.turns) for c in prompt_files.read_prompts(path)] == [
        ("1", ("a",)),
        ("81", ("b", "c")),
        ("x", ("d",)),
    ]


def test_separators_that_unicode_knows_stay_within_their_row(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "a\u2028b\u2029c\x85d"}\r\n\r\n{"prompt": "e"}\r\n'.encode())
    assert [(c.id, c.turns) for c in prompt_files.read_prompts(path)] == [
        ("1", ("a\u2028b\u2029c\x85d",)),
        ("3", ("e",)),
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: a row must be an object"),
        ('{"text": "a"}', "line 2: give"),
        ('{"prompt": ""}', "line 2: give"),
        ('{"turns": []}', "line 2: give"),
        (r'{"prompt": "a \ud800"}', "line 2: the text is no Unicode"),
        (r'{"id": "\udfff", "prompt": "a"}', "line 2: the text is no Unicode"),
        ('{"turns": ["a", 3]}', "line 2: give"),
        ('{"id": 1, "prompt": "a"}', "line 2: the id '1' stands there for the second time"),
    ],
)
def test_malformed_rows_are_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        prompt_files.read_prompts(_file(tmp_path, '{"prompt": "fine"}', line))


def test_a_row_is_named_by_the_first_key_it_has_or_by_its_number():
    rows = [("here", 7, {"b": 1, "a": 2}), ("there", 8, {"b": 3}), ("nowhere", 9, {})]
    assert [(row.where, row.id) for row in prompt_files.identified(rows, ("a", "b"))] == [
        ("here", "2"),
        ("there", "3"),
        ("nowhere", "9"),
    ]
    with pytest.raises(UserError, match="there: the id '9' stands there for the second time"):
        list(prompt_files.identified([*rows, ("there", 9, {})], ("a", "b")))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        prompt_files.read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no prompts"):
        prompt_files.read_prompts(_file(tmp_path, "", ""))


def _opened(path, conversations=(), made_with=None, *, resume):
    return prompt_files.AnswerFile(path, prompt_files.asked_turns(conversations), made_with or {}, resume=resume)


def test_an_answer_file_is_not_overwritten(tmp_path):
    path = tmp_path / "out.jsonl"
    file = _opened(path, resume=False)
    file.write({"id": "1", "text": "a"})
    with pytest.raises(UserError, match="--resume"):
        _opened(path, resume=False)


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_a_torn_last_row_is_cut_off_and_the_rest_kept(tmp_path, cut):
    """Whatever byte a killed run stopped at, resuming sees exactly the whole rows."""
    path = tmp_path / "out.jsonl"
    rows = [{"id": "1", "text": "é\u2028a"}, {"id": "2", "turn": 1, "text": "b"}]
    file = _opened(path, resume=False)
    for row in rows:
        file.write(row)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    resumed = _opened(path, resume=True)
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
            _opened(path, resume=True)
        assert path.read_text() == content


def test_rounds_ask_a_turn_after_the_one_before():
    one, two = prompt_files.Conversation("a", ("x",)), prompt_files.Conversation("b", ("y", "z"))
    assert list(prompt_files.rounds([one, two])) == [(0, [one, two]), (1, [two])]


def test_rows_are_json_lines(tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    file = _opened(path, resume=False)
    file.write({"id": "1", "text": "two\nlines"})
    assert [files.unseal("here", json.loads(line)) for line in path.read_text().splitlines()] == [
        {"id": "1", "text": "two\nlines"}
    ]


A, B = (prompt_files.Conversation(id, (text,)) for id, text in (("1", "a?"), ("2", "b?")))
HOW = {"target": "t", "temperature": 0.5, "seed": 0}


def _answered(path):
    file = _opened(path, [A, B], HOW, resume=False)
    for c in (A, B):
        file.write({"id": c.id, "prompt": c.turns[0], "text": "yes"})
    return path.read_bytes()


def test_answers_to_other_prompts_are_not_gone_on_with(tmp_path):
    """A row that is put in at the top of a file without ids moves all others; it used never to be asked."""
    path = tmp_path / "out.jsonl"
    whole = _answered(path)
    assert _opened(path, [A, B], HOW, resume=True).done.keys() == {("1", 0), ("2", 0)}
    moved = [prompt_files.Conversation(str(i), c) for i, c in enumerate((("new",), A.turns, B.turns), 1)]
    with pytest.raises(UserError, match="answers 'a\\?' in row '1', turn 0, where the prompts ask 'new'"):
        _opened(path, moved, HOW, resume=True)
    with pytest.raises(UserError, match="answers 'b\\?' in row '2', turn 0, where the prompts have nothing"):
        _opened(path, [A], HOW, resume=True)
    longer = [A, B, prompt_files.Conversation("3", ("c?",))]
    assert len(_opened(path, longer[::-1], HOW, resume=True).done) == 2
    assert path.read_bytes() == whole


@pytest.mark.parametrize("changed", [{"target": "u"}, {"temperature": 0.0}, {"seed": 1}])
def test_answers_made_in_another_way_are_not_gone_on_with(tmp_path, changed):
    path = tmp_path / "out.jsonl"
    _answered(path)
    path.write_bytes(path.read_bytes() + b'{"torn')
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (name, value), was = next(iter(changed.items())), HOW[next(iter(changed))]
    with pytest.raises(UserError, match=f"holds answers made with {name} {was}, not {value}: name another file"):
        _opened(path, [A, B], HOW | changed, resume=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    (tmp_path / "out.jsonl.about.json").unlink()  # an earlier version did not keep it
    assert len(_opened(path, [A, B], HOW | changed, resume=True).done) == 2


def test_an_answer_that_was_changed_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    whole = _answered(path).decode()
    path.write_text(whole.replace("yes", "yet", 1))
    with pytest.raises(UserError, match="out.jsonl, line 1 is not what was written there"):
        _opened(path, [A, B], HOW, resume=True)
    path.write_text(whole)
    (tmp_path / "out.jsonl.about.json").write_text(json.dumps(files.seal(HOW) | {"seed": 4}))
    with pytest.raises(UserError, match="about.json is not what was written there"):
        _opened(path, [A, B], HOW, resume=True)
