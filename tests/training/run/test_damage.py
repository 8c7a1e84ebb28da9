"""One byte flipped, or a truncation, anywhere in what a run, a job or `load` reads: never taken for what was written.

It is refused with a sentence, passed over with a warning, or without any effect on what is read.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from specformer_jax import files
from specformer_jax.batch.conversations import Conversation
from specformer_jax.batch.prompt_files import AnswerFile, asked_turns
from specformer_jax.errors import UserError
from specformer_jax.loading import head_checkpoint
from specformer_jax.training import metrics
from specformer_jax.training.data.documents import META, read_meta
from specformer_jax.training.data.sources import read_documents
from specformer_jax.training.report import data_report, model_card
from specformer_jax.training.run import run_record
from specformer_jax.training.run.checkpoint import Checkpoints, load_params

from .. import tiny
from .test_answer_shards import answer
from .test_answer_shards import opened as open_shard
from .test_checkpoint import ABSTRACT, state
from .test_hook_store import opened as open_hooks
from .test_hook_store import read as read_hooks
from .test_owner import described

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")

CONVERSATIONS = [Conversation(str(i), (f"question {i}", "and then?")) for i in range(3)]
ASKED = asked_turns(CONVERSATIONS)
WANTED = {f"{part}{i}": [5, i] for part in ("done", "begun") for i in range(3)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """All that is written: by a run, a job, distill and export."""
    folder = tmp_path_factory.mktemp("whole")
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state(step), {"data": {"next": step}}, 1.0 + step)
    checkpoints.close()
    run_record.write(folder, described())
    writer = metrics.MetricsWriter(folder, 0)
    scalar, slots = np.float32(1.25), np.ones(3, np.float32)
    for step in range(1, 6):
        writer.add(step, [metrics.StepMetrics(scalar, slots, slots, scalar, scalar, scalar)], 10.0, 0.1)
    writer.close()
    open_hooks(folder / "hooks").fill(read_hooks, report=lambda line: None)
    answers = folder / "answers"
    answers.mkdir()
    for number, part in enumerate(("done", "begun")):
        wanted = {name: ids for name, ids in WANTED.items() if name.startswith(part)}
        shard = open_shard(answers / f"shard-0000{number}.jsonl", wanted)
        for name, ids in list(wanted.items())[: 3 - number]:
            row = {"id": name, "temperature": 0.0, "seed": 1, "prompt_ids": ids, "response_ids": [7, 8, 9]}
            answer(shard, row)
    (answers / META).write_text(json.dumps(files.seal({"target": "tiny", "seed": 0})))
    draft = tiny.config().draft
    shapes = nn.unbox(head_checkpoint.boxed_params(tiny.TARGET, draft))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
    head_checkpoint.save_head(folder / "head", draft, tiny.TARGET, params, np.arange(64))
    head_checkpoint.record_acceptance(folder / "head", [0.5, 0.25, 0.125])
    (folder / data_report.NAME).write_text(json.dumps(files.seal({"step_flops": 12, "documents": 3})))
    (folder / "evaluation.json").write_text(json.dumps(files.seal({"weights": "abc", "files": {"p": {"kappa": 1.5}}})))
    output = AnswerFile(folder / "out.jsonl", ASKED, {"seed": 3}, resume=False)
    for c in CONVERSATIONS[:2]:
        for turn, text in enumerate(c.turns):
            output.write({"id": c.id, "turn": turn, "prompt": text, "text": "an answer", "kappa": 1.5})
    return folder


def restore(folder: Path) -> Any:
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        return checkpoints.restore(ABSTRACT)
    finally:
        checkpoints.close()


def resumed_metrics(folder: Path) -> Any:
    metrics.MetricsWriter(folder, 5)
    return metrics.read(folder / "metrics.jsonl")


def begun_shard(folder: Path) -> Any:
    wanted = {name: ids for name, ids in WANTED.items() if name.startswith("begun")}
    shard = open_shard(folder / "answers" / "shard-00001.jsonl", wanted)
    return [row for name, ids in wanted.items() if (row := shard.find(name, 0, ids))]


READERS: dict[str, Callable[[Path], Any]] = {
    "checkpoints": restore,
    "checkpoints to export": lambda folder: load_params(folder / "checkpoints"),
    "run.json": run_record.read,
    "metrics.jsonl": resumed_metrics,
    "hooks": lambda folder: [np.array(open_hooks(folder / "hooks")[i]) for i in range(7)],
    "answers/shard-00000": lambda folder: [d[1:] for d in read_documents(folder / "answers" / "shard-00000.jsonl")],
    "answers/shard-00001": begun_shard,
    "answers to train on": lambda folder: [d[1:] for d in read_documents(folder / "answers")],
    "answers/distilled": lambda folder: read_meta(folder / "answers"),
    "head": lambda folder: (
        head_checkpoint.load_head(folder / "head", tiny.TARGET),
        head_checkpoint.read_config(folder / "head")["acceptance"],
    ),
    "data_report.json": data_report.read,
    "evaluation.json": lambda folder: model_card.read_evaluation(folder / "evaluation.json", {"weights": "abc"}),
    "out.jsonl": lambda folder: AnswerFile(folder / "out.jsonl", ASKED, {"seed": 3}, resume=True).done,
}


def same(found: Any, expected: Any) -> bool:
    """Bit for bit; a damaged name of a digest is one field more, and nothing reads it."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(key in found and same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, (np.ndarray, jax.Array)):
        found, expected = np.asarray(found), np.asarray(expected)
        return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()
    return type(found) is type(expected) and found == expected


def damage(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    if rng.random() < 0.3:
        file.write_bytes(content[:at])
        return f"{file.name} cut at {at}"
    content[at] ^= rng.randrange(1, 256)
    file.write_bytes(content)
    return f"{file.name}, byte {at} flipped"


def check(whole: Path, folder: Path, kind: str, seed: int, caplog) -> None:
    rng, read = random.Random(seed), READERS[kind]
    expected = read(whole)
    shutil.copytree(whole, folder)
    prefix = folder / kind.split()[0]
    found_files = [file for file in sorted(folder.rglob("*")) if str(file).startswith(str(prefix)) and file.is_file()]
    what = damage(rng.choice([file for file in found_files if file.stat().st_size]), rng)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        try:
            found = read(folder)
        except UserError as error:
            assert "\n" not in str(error), what
            return
    if not same(found, expected):
        # What was passed over is said; what is taken in its place was written, too.
        in_the_making = kind in ("answers/shard-00001", "answers to train on", "out.jsonl")
        assert caplog.records or in_the_making, what
        if kind == "checkpoints":
            step, restored, extra = found
            assert step == 1 and same(restored, state(1)) and extra == {"data": {"next": 1}}, what
        elif kind == "out.jsonl":  # what is not there is asked again
            assert all(same(found[key], expected[key]) for key in found), what
        elif kind == "data_report.json":  # without it a step's share of the chip is not told
            assert found is None, what
        else:
            assert all(any(same(row, other) for other in expected) for row in found), what


@pytest.mark.parametrize("kind", READERS)
def test_damage_is_never_taken_for_what_was_written(whole, tmp_path, caplog, kind):
    for seed in (1, 2):
        check(whole, tmp_path / str(seed), kind, seed, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_damage_at_many_places(whole, tmp_path, caplog, seed):
    check(whole, tmp_path / "damaged", list(READERS)[seed % len(READERS)], 1000 + seed, caplog)
