"""Files that are written whole or not at all, and files that grow by whole lines."""

import errno
import json
import os

import pytest

from specformer_jax import files
from specformer_jax.errors import UserError


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_whole(path, "old")

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    monkeypatch.undo()
    files.write_whole(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"torn", []),
        (b"one\n", [b"one\n"]),
        (b"one\ntorn", [b"one\n"]),
        (b"one\r\n\ntwo \r three\n", [b"one\r\n", b"\n", b"two \r three\n"]),
    ],
)
def test_a_torn_last_line_is_left_out_and_can_be_cut_off(tmp_path, content, lines):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert files.whole_lines(path) == lines and path.read_bytes() == content
    files.cut_torn_line(path)
    assert path.read_bytes() == b"".join(lines)


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert files.whole_lines(tmp_path / "none") == []
    files.cut_torn_line(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("changed", [{"a": [1, 3]}, {"b": None}, {"c": 1}, {files.SEAL: "0"}, {files.SEAL: None}])
def test_a_sealed_object_is_what_was_sealed(tmp_path, changed):
    sealed = files.seal({"a": [1, 2], "b": "é"})
    path = tmp_path / "a.json"
    path.write_text(json.dumps(sealed))
    assert files.read_sealed(path) == {"a": [1, 2], "b": "é"}
    path.write_text(json.dumps(sealed | changed))
    with pytest.raises(UserError, match="a.json is not what was written there: it is damaged"):
        files.read_sealed(path)
    assert files.unseal("here", {"a": 1}) == {"a": 1}, "an earlier version's object has no digest"
