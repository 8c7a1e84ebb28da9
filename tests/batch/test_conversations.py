"""Every layout that people keep dialogues in becomes the same dialogue, and nothing of a row vanishes uncounted."""

from __future__ import annotations

import json

import pytest

from specformer_jax.batch import omissions
from specformer_jax.batch.conversations import Conversation, read_conversations, read_row
from specformer_jax.batch.omissions import Omission
from specformer_jax.batch.row_files import PromptRow
from specformer_jax.errors import UserError

ASKED = Conversation("x", ("u1", "u2"), "s", ("a1", None))
SAID = (("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"))
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


def openai(*said):
    return [{"role": role, "content": text} for role, text in said]


def sharegpt(*said):
    return [{"from": SHAREGPT.get(role, role), "value": text} for role, text in said]


def parts(text):
    return [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]


def read(fields, system=None):
    return read_row(PromptRow("row", "x", fields), system)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": openai(*SAID)},
        {"messages": openai(*((role, parts(text)) for role, text in SAID)), "prompt": "u1", "turns": None},
        {"messages": [{"role": role, "content": [text]} for role, text in SAID]},
        {"conversations": sharegpt(*SAID)},
        {"conversations": sharegpt(*SAID[1:]), "system": "s"},
        {"conversation": openai(*SAID[1:]), "system_prompt": "s"},
        {"prompt": openai(*SAID)},
        {"messages": openai(("developer", "s"), ("human", "u1"), ("Assistant", "a1"), ("user", "u2"))},
    ],
)
def test_dialogues_of_every_layout(fields):
    assert read(fields) == (ASKED, [])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "p"}, (("p",), (None,))),
        ({"prompt": "p", "completion": "c"}, (("p",), ("c",))),
        ({"turns": ["t", "u"]}, (("t", "u"), (None, None))),
        ({"instruction": "i"}, (("i",), (None,))),
        ({"instruction": "i", "input": "", "output": "o"}, (("i",), ("o",))),
        ({"instruction": "i", "input": "j", "response": "o"}, (("i\n\nj",), ("o",))),
        ({"messages": openai(("user", "a"), ("user", "b"))}, (("a", "b"), (None, None))),
        ({"messages": openai(("system", ""), ("user", "a"))}, (("a",), (None,))),
    ],
)
def test_rows_without_a_dialogue(fields, expected):
    assert read(fields) == (Conversation("x", expected[0], None, expected[1]), [])


def test_a_system_prompt_by_flag_gives_way_to_the_rows_own():
    assert read({"prompt": "p"}, "flag")[0].system == "flag"
    assert read({"messages": openai(("system", " "), ("user", "p"))}, "flag")[0].system == "flag"
    assert read({"prompt": "p", "system": "own"}, "flag")[0].system == "own"


IMAGE = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    ("messages", "turns", "left_out"),
    [
        (openai(("assistant", "hello"), ("user", "a")), ("a",), (1, "an answer before the first question")),
        (openai(("user", "a"), ("tool", "t"), ("user", "b")), ("a",), (2, "a message of the role 'tool'")),
        (
            openai(("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d")),
            ("a",),
            (2, "two answers"),
        ),
        (
            openai(("user", "a"), ("system", "s"), ("user", "b")),
            ("a",),
            (2, "a system prompt"),
        ),
        (openai(("user", "a"), ("user", IMAGE), ("user", "b")), ("a",), (2, "a content part that is no text")),
        (openai(("user", "a"), ("assistant", None), ("user", "b")), ("a", "b"), (1, "an empty message")),
        (openai(("user", "a"), ("user", 5)), ("a",), (1, "a message that is no text")),
        (openai(("user", "a"), ("user", "half \ud800")), ("a",), (1, "the text is no Unicode")),
        (openai(("user", " \n"), ("user", "b")), None, (1, "an empty message")),
        (openai(("user", [{"type": "text", "text": 5}])), None, (1, "a message that is no text")),
        (openai(("assistant", "a")), None, (1, "an answer before the first question")),
        ([], None, (1, "no message of the user")),
    ],
)
def test_what_cannot_be_asked_is_counted_with_its_reason(messages, turns, left_out):
    conversation, [omission] = read({"messages": messages})
    assert (None if conversation is None else conversation.turns) == turns
    assert omission.part == ("message" if turns else "row") and omission.where == "row"
    assert omission.count == left_out[0] and omission.reason.startswith(left_out[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "a"}, 'row: give "messages", "conversations", "turns", "prompt" or "instruction"'),
        ({"messages": "a"}, 'row: "messages" must be a list'),
        ({"messages": ["a"]}, 'row: message 1 of "messages" has no "role" and "content"'),
        ({"conversations": [{"from": "human", "value": "a"}, {"value": "b"}]}, 'message 2 of "conversations"'),
    ],
)
def test_a_row_of_no_layout_is_a_mistake(fields, message):
    with pytest.raises(UserError, match=message):
        read(fields)


def test_a_source_keeps_count_and_one_without_a_dialogue_is_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"prompt": "a"}, {"prompt": ""}, {"messages": openai(("user", "b"), ("tool", "t"))}, {"messages": []}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, left_out = read_conversations(file)
    assert [c.id for c in found] == ["1", "3"]
    assert [(omission.where.split(", ")[1], omission.part) for omission in left_out] == [
        ("line 2", "row"),
        ("line 3", "message"),
        ("line 4", "row"),
    ]
    file.write_text(json.dumps(rows[1]))
    with pytest.raises(UserError, match="holds no prompts: .*line 1: an empty message"):
        read_conversations(file)
    file.write_text("")
    with pytest.raises(UserError, match="holds no prompts$"):
        read_conversations(file)


def test_omissions_are_summed_up_and_listed(tmp_path):
    some = [Omission("a", "token", 3, "long"), Omission("b", "row", 1, "é"), Omission("c", "token", 1_200, "long")]
    assert omissions.summary(some) == ["left out 1 row: é", "left out 1,203 tokens of 2 rows: long"]
    omissions.write(tmp_path / "left_out.jsonl", some)
    lines = (tmp_path / "left_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [Omission(**json.loads(line)) for line in lines] == some
    omissions.write(tmp_path / "left_out.jsonl", [])
    assert not (tmp_path / "left_out.jsonl").exists()
    with pytest.raises(UserError, match="cannot be listed"):
        omissions.write(tmp_path / "none" / "left_out.jsonl", some)
