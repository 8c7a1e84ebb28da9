"""Files that are written whole or not at all."""

import errno
import os

import pytest

from specformer_jax import files


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
