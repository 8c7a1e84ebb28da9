"""Rows are read from whatever people keep them in, and a row that is none is named."""

from __future__ import annotations

import gzip
import json
import sys
import types

import pytest

from specformer_jax.batch.row_files import read_rows
from specformer_jax.errors import UserError

ROWS = [{"id": "a", "prompt": "p"}, {"prompt": "q\u2028r"}, {"question_id": 7, "prompt": "s"}]
IDS = ["a", "2", "7"]


def _lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _write_parquet(path, rows):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.json", "d.json", "e.parquet", "folder"])
def test_the_same_rows_whatever_they_stand_in(tmp_path, name):
    path = tmp_path / name
    if name == "a.jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + _lines(ROWS))  # with the mark that some editors put before UTF-8
    elif name == "b.jsonl.gz":
        path.write_bytes(gzip.compress(_lines(ROWS)))
    elif name == "c.json":
        path.write_text(json.dumps(ROWS, indent=2))
    elif name == "d.json":  # the ending does not say which of the two it is
        path.write_bytes(_lines(ROWS))
    elif name == "e.parquet":
        columns = {key: None for row in ROWS for key in row}
        _write_parquet(path, [columns | {key: str(value) for key, value in row.items()} for row in ROWS])
    else:
        path.mkdir()
        (path / "1.jsonl").write_bytes(_lines(ROWS[:1]))
        (path / "2.json").write_text(json.dumps(ROWS[1:]))
        (path / "README.md").write_text("notes")
    rows = list(read_rows(path))
    assert [row.id for row in rows] == IDS
    assert [row.fields["prompt"] for row in rows] == ["p", "q\u2028r", "s"]


def test_a_row_stands_on_its_line_and_is_named_by_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a"}\r\n\r\n{"prompt": "b", "id": null}\r\n')
    rows = list(read_rows(tmp_path / "a.jsonl"))
    assert [(row.where, row.id) for row in rows] == [
        (f"{tmp_path / 'a.jsonl'}, line 1", "1"),
        (f"{tmp_path / 'a.jsonl'}, line 3", "3"),
    ]


class _DatasetDict(dict):
    pass


def _fake_datasets(asked):
    def load_dataset(name, *configuration, split):
        if name == "gone/away":
            raise ConnectionError("no network")
        asked.append((name, *configuration, split))
        return [dict(row) for row in ROWS]

    def load_from_disk(folder):
        asked.append((folder,))
        return _DatasetDict(train=ROWS, test=ROWS[:1])

    return types.SimpleNamespace(load_dataset=load_dataset, load_from_disk=load_from_disk)


def test_datasets_by_id_and_on_disk(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "datasets", _fake_datasets(asked))
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_dict.json").write_text("{}")
    for source, count in (("a/b", 3), ("a/b:dev", 3), ("a/b:all:dev", 3), (str(saved), 3), (f"{saved}:test", 1)):
        assert [row.id for row in read_rows(source)] == IDS[:count]
    assert asked == [("a/b", "train"), ("a/b", "dev"), ("a/b", "all", "dev"), (str(saved),), (str(saved),)]
    with pytest.raises(UserError, match="the dataset gone/away cannot be read: no network"):
        list(read_rows("gone/away"))
    with pytest.raises(UserError, match="the dataset .* cannot be read: 'other'"):
        list(read_rows(f"{saved}:other"))


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "state.json").write_text("{}")
    for package in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    for source in ("a/b", tmp_path):
        with pytest.raises(UserError, match="pip install datasets"):
            list(read_rows(source))
    with pytest.raises(UserError, match=r"to read .*a.parquet, pip install pyarrow"):
        list(read_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{', "line 2: not valid JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n[1]', "line 2: a row must be a JSON object"),
        ("a.json", b'[{"prompt": "a"}, null]', "row 2: a row must be a JSON object"),
        ("a.json", b'[{"prompt": "a"}', "a.json: not valid JSON"),
        ("a.json", b"[" * 100_000, "a.json: not valid JSON"),
        ("a.jsonl", b"\xff\xfe", "a.jsonl cannot be read"),
        ("a.jsonl.gz", b"no archive", "a.jsonl.gz cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-9], "a.jsonl.gz cannot be read"),
        ("a.parquet", b"PAR1 and nothing else PAR1", "a.parquet cannot be read"),
        ("a.jsonl", b'{"id": 1}\n{"id": "1"}', "line 2: the id '1' stands there for the second time"),
        ("a.jsonl", rb'{"id": "\udfff", "prompt": "a"}', "line 1: the text is no Unicode"),
    ],
)
def test_what_is_no_row_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(tmp_path / name))


def test_missing_files_and_folders_without_rows(tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl cannot be read"):
        list(read_rows(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="holds no file of rows"):
        list(read_rows(tmp_path))
