"""Shards of answers are what was written, whole or in the making."""

from __future__ import annotations

import hashlib
import json

import pytest

from specformer_jax import files
from specformer_jax.errors import UserError
from specformer_jax.training.data.documents import read_shards
from specformer_jax.training.distillation.answer_shards import Shard

WANTED = {"a": [5], "b": [6], "c": [7]}


def row(name: str) -> dict:
    return {"id": name, "temperature": 0.0, "seed": 1, "prompt_ids": WANTED[name], "response_ids": [8, 9, 10]}


def opened(file, wanted=WANTED) -> Shard:
    """The shard as `distill` opens it, with prompts of one turn: those that have their answers end."""
    shard = Shard(file, list(wanted))
    there = [name for name, prompt_ids in wanted.items() if shard.find(name, 0, prompt_ids)]
    shard.check_all_found()
    for name in there:
        shard.end(name)
    return shard


def answer(shard: Shard, row: dict) -> None:
    shard.add(row)
    shard.end(row["id"])


@pytest.fixture
def file(tmp_path):
    shard = opened(tmp_path / "shard-00000.jsonl")
    for name in WANTED:
        answer(shard, row(name))
    return tmp_path / "shard-00000.jsonl"


def test_a_shard_has_a_digest_that_sha256sum_reads(file):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (file.parent / "shard-00000.jsonl.sha256").read_text() == f"{digest}  shard-00000.jsonl\n"
    assert [json.loads(line) for line in file.read_text().splitlines()] == [row(name) for name in WANTED]
    assert [document.id for document in read_shards(file.parent)] == ["a", "b", "c"]


@pytest.mark.parametrize("damage", ["an id", "a row less", "an empty file", "another digest", "no digest"])
def test_a_shard_that_was_changed_is_refused(file, damage):
    whole, digest = file.read_bytes(), file.with_name(f"{file.name}.sha256")
    file.write_bytes(
        {
            "an id": whole.replace(b"8, 9", b"8, 7"),
            "a row less": b"".join(whole.splitlines(keepends=True)[:2]),
            "an empty file": b"",
        }.get(damage, whole)
    )
    if damage.endswith("digest"):
        digest.write_bytes(b"" if damage == "no digest" else digest.read_bytes().replace(digest.read_bytes()[:1], b"x"))
    for read in (lambda: read_shards(file), lambda: opened(file)):
        with pytest.raises(UserError, match="shard-00000.jsonl is not what was written there"):
            read()


def test_a_row_of_a_shard_in_the_making_that_was_changed_is_refused(tmp_path):
    file, part = tmp_path / "shard-00000.jsonl", tmp_path / "shard-00000.part"
    shard = opened(file)
    for name in ("c", "a"):
        answer(shard, row(name))
    whole = part.read_text()
    part.write_text(whole.replace("8, 9", "8, 7", 1))
    for read in (lambda: read_shards(tmp_path), lambda: opened(file)):
        with pytest.raises(UserError, match="shard-00000.part, line 1 is not what was written there"):
            read()
    part.write_text(whole)
    for name in (file.name, f"{file.name}.sha256", "distilled.json"):  # as a kill leaves what is written whole
        (tmp_path / f"{name}.0123abcd.part").write_text('{"half": ')
        (tmp_path / f"{name}.4567cdef.part").write_text('{"whole": 1}\n')
    assert [document.id for document in read_shards(tmp_path)] == ["c", "a"]
    answer(opened(file), row("b"))
    assert [document.id for document in read_shards(tmp_path)] == ["a", "b", "c"] and not part.exists()


def test_a_process_that_is_killed_before_the_digest_leaves_a_shard_to_go_on_with(file, monkeypatch):
    """Whether it is the first digest of a shard or that of a longer one."""
    before, write = file.read_bytes(), files.write_whole

    def killed(path, content):
        if str(path).endswith(".sha256"):
            raise KeyboardInterrupt
        write(path, content)

    more = WANTED | {"d": [11]}
    shard = opened(file, more)
    monkeypatch.setattr(files, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        answer(shard, row("a") | {"id": "d", "prompt_ids": [11]})
    monkeypatch.undo()
    opened(file, more)
    assert file.read_bytes().startswith(before) and len(read_shards(file)) == 4
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(UserError, match="not what was written there"):
        read_shards(file)
