"""Packing, hosts, resuming, TFDS, and what bad data says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from specformer_jax.errors import UserError
from specformer_jax.training.data.batches import Batches, iterate_batches
from specformer_jax.training.data.documents import META, TFDS_META, draft_vocabulary
from specformer_jax.training.data.sources import are_answers, check_tokenizer, read_documents

from . import tiny


def _batches(documents, **changes):
    settings = dict(slots=3, sequence_length=64, rows=4, anchors=48, seed=1)
    return Batches(documents, **(settings | changes))


def test_every_answer_token_is_forecast_once_an_epoch_and_labels_are_ahead():
    documents = tiny.documents()
    source = _batches(documents)
    source[0]
    seen = []
    for i in range(source._starts[1]):
        batch = source[i]
        for tokens, segments, anchors, labels in zip(
            batch["tokens"], batch["segments"], batch["anchors"], batch["labels"], strict=True
        ):
            for anchor, row in zip(anchors, labels, strict=True):
                if row[0] < 0:
                    continue
                for j, label in enumerate(row):
                    inside = anchor + 2 + j < 64 and segments[anchor + 2 + j] == segments[anchor]
                    assert label == (tokens[anchor + 2 + j] if inside else -1)
                seen.append(row[0])
    expected = sum(end - begin - 1 for d in documents for begin, end in d.answers)
    assert expected <= len(seen) <= expected * 1.3  # the last batch repeats some rows to be full


def test_hosts_share_the_same_global_batch():
    whole = _batches(tiny.documents())[7]
    parts = [_batches(tiny.documents(), share=share)[7] for share in ((0, 1), (2, 3))]
    for name in whole:
        np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))


def test_fewer_packed_rows_than_a_batch_has_are_repeated():
    few = [d._replace(tokens=np.resize(d.tokens, 60)) for d in tiny.documents(3)]
    batch = _batches(few, slots=1, anchors=60, rows=8)[0]
    assert len(batch["tokens"]) == 8 and len(np.unique(batch["tokens"], axis=0)) == 3
    # An epoch of more rows than a batch has is filled up with its own, those at the numbers that are missing.
    source = _batches(tiny.documents())
    source[0]
    plan = source._plan(0)
    packed = next(i for i in range(len(plan)) if plan[i] in plan[:i])
    assert len(plan) > 4 and plan[packed:] == [plan[i % 4] for i in range(packed, len(plan))]


def test_iterator_state_resumes():
    first = iterate_batches(_batches(tiny.documents()))
    for _ in range(5):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    expected = next(first)
    second = iterate_batches(_batches(tiny.documents()))
    second.set_state(state)
    np.testing.assert_array_equal(next(second)["tokens"], expected["tokens"])


def test_jsonl_and_tfds_hold_the_same_documents(tmp_path):
    from specformer_jax.training.data import tfds_files

    file = tmp_path / "answers.jsonl"
    with file.open("w") as out:
        for d in tiny.documents(8):
            ids = d.tokens.tolist()
            row = {"id": d.id, "prompt_ids": ids[:5], "response_ids": ids[5:], "temperature": 0.8}
            out.write(json.dumps(row) + "\n")
    documents = read_documents(file, tiny.TARGET.vocab_size)
    stored = read_documents(tfds_files.build(documents, tmp_path / "tfds"))
    by_id = {d.id: d for d in (stored[i] for i in range(len(stored)))}
    assert len(by_id) == 8
    for d in documents:
        np.testing.assert_array_equal(by_id[d.id].tokens, d.tokens)
        assert by_id[d.id].answers == d.answers


def test_a_tfds_dataset_of_before_has_one_answer_a_document():
    from specformer_jax.training.data import tfds_files

    row = {"id": b"a", "tokens": np.arange(5), "prompt": 2, "temperature": 0.5}
    [document] = tfds_files._Source([row], "here", None)
    assert document.answers == ((2, 5),) and document.tokens.tolist() == [0, 1, 2, 3, 4]


def test_tfds_is_not_taken_for_other_answers(tmp_path):
    from specformer_jax.training.data import tfds_files

    documents = tiny.documents(8)
    path = tfds_files.build(documents, tmp_path, "tiny")
    files = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert tfds_files.build(documents[::-1], tmp_path, "tiny") == path  # a run that is resumed
    other = [documents[0]._replace(answers=((4, 9),)), *documents[1:]]
    for changed in (other, documents[1:], tiny.documents(9)):
        with pytest.raises(UserError, match=f"other answers than the data: name a new directory .* --data {path}"):
            tfds_files.build(changed, tmp_path, "tiny")
    assert files == {file.name: file.stat().st_mtime_ns for file in path.iterdir()}

    (path / TFDS_META).unlink()  # as an earlier version wrote it
    assert tfds_files.build(documents, tmp_path) == path
    with pytest.raises(UserError, match="other answers"):
        tfds_files.build(other, tmp_path)


def test_tfds_of_a_quicker_host_is_taken_and_a_folder_that_cannot_be_is_a_sentence(tmp_path, monkeypatch):
    from specformer_jax.training.data import tfds_files

    def late(builder):
        prepare(builder)
        raise FileExistsError("Cannot rename 1.0.0.incomplete: 1.0.0 already exists")

    prepare = tfds_files._Distilled.download_and_prepare
    monkeypatch.setattr(tfds_files._Distilled, "download_and_prepare", late)
    path = tfds_files.build(tiny.documents(8), tmp_path / "tfds", "tiny")
    assert len(tfds_files.open_source(path)) == 8
    monkeypatch.undo()
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", Path("/proc/nope")):
        with pytest.raises(UserError, match=f"cannot be written to {folder}"):
            tfds_files.build(tiny.documents(8), folder, "tiny")


def test_answers_are_told_from_dialogues(tmp_path):
    answer, dialogue = '{"prompt_ids": [1, 2], "response_ids": [3, 4]}\n', '{"prompt": "Why is the sky blue?"}\n'
    files = {
        "ids.jsonl": answer.encode(),
        "ids.jsonl.gz": gzip.compress(answer.encode()),
        "text.jsonl": dialogue.encode(),
    }
    files |= {"broken.jsonl.gz": b"no archive", "empty.jsonl": b"", "array.json": b'["a"]'}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert are_answers(tmp_path / name) is name.startswith("ids"), name
    assert not are_answers(tmp_path / "none.jsonl") and not are_answers(tmp_path)
    (tmp_path / META).write_text("{}")
    assert are_answers(tmp_path)
    (tmp_path / "shards").mkdir()
    assert not are_answers(tmp_path / "shards")
    (tmp_path / "shards" / "a.jsonl").write_text("\n" + answer)
    assert are_answers(tmp_path / "shards")


def test_tfds_is_checked_like_the_shards(tmp_path):
    from specformer_jax.training.data import tfds_files

    path = tfds_files.build(tiny.documents(8), tmp_path, "abc")
    check_tokenizer(path, "abc")
    with pytest.raises(UserError, match="tokenizer abc"):
        check_tokenizer(path, "def")
    _batches(read_documents(path, tiny.TARGET.vocab_size))
    with pytest.raises(UserError, match="the dataset in .* is not among the target's 50"):
        _batches(read_documents(path, 50))


def test_a_mixture_takes_its_share_of_each_source(tmp_path):
    row = {"prompt_ids": [1, 2], "response_ids": [3, 4, 5]}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = [json.dumps(row | {"id": f"{name}/{i}"}) for i in range(400)]
        (tmp_path / name / "shard.jsonl").write_text("\n".join(lines))

    def mixed(shares):
        (tmp_path / "mixture.json").write_text(json.dumps(shares))
        return [d.id for d in read_documents(tmp_path / "mixture.json", 64)]

    assert are_answers(tmp_path / "mixture.json") and not are_answers(tmp_path / "prompts.json")
    less, more = mixed({"a": 1, "b/": 0.2}), mixed({"a": 1, "b/": 0.5})
    assert less[:400] == more[:400] == [f"a/{i}" for i in range(400)]
    assert 50 < len(less) - 400 < 110 < 160 < len(more) - 400 < 240
    assert set(less) < set(more) and set(more[400:]) < {f"b/{i}" for i in range(400)}
    (tmp_path / "b" / META).write_text('{"tokenizer": "abc"}')
    check_tokenizer(tmp_path / "mixture.json", "abc")
    with pytest.raises(UserError, match="b was made with tokenizer abc"):
        check_tokenizer(tmp_path / "mixture.json", "def")
    for shares in ([], {}, {"a": 0}, {"a": 2}, {"a": "all"}, {"a": True}, {"other-mixture.json": 1}):
        with pytest.raises(UserError, match="must be an object of sources and shares within 0 and 1"):
            mixed(shares)
    with pytest.raises(UserError, match="takes no document: give larger shares"):
        mixed({"a": 1e-9})
    with pytest.raises(UserError, match="none.jsonl cannot be read"):
        mixed({"none.jsonl": 1})
    with pytest.raises(UserError, match="the mixture .* cannot be read"):
        read_documents(tmp_path / "other-mixture.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("{", "line 1"),
        ('{"prompt_ids": [1, 2]}', "no answer"),
        ('{"prompt_ids": [1], "response_ids": []}', "no answer"),
        ('{"prompt_ids": [1], "response_ids": [5000]}', "5000"),
        ('{"prompt_ids": [1], "response_ids": [-3, 4]}', "token id -3"),
        ('{"prompt_ids": "abc", "response_ids": [1]}', "line 1: prompt_ids and response_ids must be lists"),
        ('{"prompt_ids": [1], "response_ids": 5}', "must be lists of token ids"),
        ('{"prompt_ids": [[1]], "response_ids": [1.5]}', "must be lists of token ids"),
        ('{"prompt_ids": [1], "response_ids": [1], "temperature": null}', "line 1: .* temperature"),
    ],
)
def test_bad_data_says_what_is_wrong(tmp_path, text, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_documents(file, tiny.TARGET.vocab_size)


def test_a_damaged_archive_is_one_sentence(tmp_path):
    row = {"prompt_ids": [1, 2, 3], "response_ids": list(range(3, 60))}
    packed = bytearray(gzip.compress("".join(json.dumps(row | {"id": str(i)}) + "\n" for i in range(50)).encode()))
    for at in range(20, len(packed), 7):
        damaged = packed[:at] + bytes([packed[at] ^ 0xFF]) + packed[at + 1 :]
        (tmp_path / "data.jsonl.gz").write_bytes(damaged)
        with pytest.raises(UserError):
            list(read_documents(tmp_path / "data.jsonl.gz"))


def test_missing_file_and_other_tokenizer(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_documents(tmp_path / "none.jsonl")
    (tmp_path / META).write_text('{"tokenizer": "abc"}')
    with pytest.raises(UserError, match="tokenizer abc"):
        check_tokenizer(tmp_path, "def")


def test_draft_vocabulary_keeps_the_end_token():
    ids = draft_vocabulary(tiny.documents(), 16, tiny.TARGET)
    assert len(ids) == 16 and 2 in ids and (np.diff(ids) > 0).all()
