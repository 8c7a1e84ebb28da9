"""What a run leaves for people: its report, the card of its head, its curves on other boards."""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import flax.linen as nn
import jax
import numpy as np
import pytest

import train
from specformer_jax import files
from specformer_jax.errors import UserError
from specformer_jax.loading import head_checkpoint
from specformer_jax.training import metrics
from specformer_jax.training.report import boards, curves, data_report, model_card, run_report
from specformer_jax.training.report.step_times import StepTimes
from specformer_jax.training.run import run_record
from specformer_jax.training.train_step import StepMetrics

from .. import tiny
from .test_owner import described

SCALAR, SLOTS = np.float32(1.25), np.ones(3, np.float32)
METRICS = StepMetrics(SCALAR, SLOTS, SLOTS, SCALAR, SCALAR, SCALAR)


@pytest.fixture
def run(tmp_path):
    """A run of twelve steps, as it leaves its files."""
    folder = tmp_path / "a <run>"
    folder.mkdir()
    run_record.write(folder, described())
    writer = metrics.MetricsWriter(folder, 0)
    for step in range(2, 14, 2):
        counts = {"kappa": 1 + step / 10, "acceptance": [0.5, 0.2, 0.1], "answers": 7, "tokens": 70, "steps": 50}
        counts |= {"kappa_by_budget": {"1": 1.5, "2": 1.625}, "sample": [[False, "a <b> "], [True, "drafted &"]]}
        more = {"seconds": {"data": 0.5, "target": 1.0, "head": 2.5}, "mfu": 0.25}
        writer.add(step, [METRICS] * 2, 10.0, 0.1, more | ({"held_out": counts} if step % 4 == 0 else {}))
    writer.close()
    kept = {"documents": 9, "answers": 9, "tokens": 900, "answer_tokens": 700, "rows": 6, "fill": 0.75}
    kept |= {"steps_per_epoch": 3, "in_draft_vocabulary": 0.5, "step_flops": 10}
    kept["left_out"] = [{"part": "row", "reason": "too <long>", "count": 2, "rows": 2}]
    (folder / data_report.NAME).write_text(json.dumps(files.seal(kept)))
    return folder


def test_a_report_tells_the_run_and_quotes_what_others_wrote(run):
    page = run_report.write(run).read_text()
    for told in ("12</b><span>of 20 steps", "2.200</b><span>held-out kappa", "at step 12", "25.0%</b>"):
        assert told in page, told
    assert "<mark>drafted &amp;</mark>" in page and "a &lt;b&gt; " in page and "too &lt;long&gt;" in page
    assert "<title>a &lt;run&gt;" in page and "62.5%" in page  # of the time went to the head
    assert ("<svg" in page) == (importlib.util.find_spec("matplotlib") is not None) == (run / "curves.png").exists()


def test_a_report_does_without_what_is_not_there(run, monkeypatch):
    monkeypatch.setattr(curves, "draw", lambda rows: None)
    (run / data_report.NAME).write_text("{}")
    assert 'pip install -e ".[train]"' in run_report.write(run).read_text()
    (run / "metrics.jsonl").unlink()
    assert "no line of metrics yet" in run_report.write(run).read_text()
    (run / "run.json").unlink()
    with pytest.raises(UserError, match="is no training run"):
        run_report.write(run)


def test_a_damaged_data_report_is_not_used(run, caplog):
    text = (run / data_report.NAME).read_text()
    (run / data_report.NAME).write_text(text.replace('"step_flops": 10', '"step_flops": 11'))
    assert data_report.read(run) is None and "the report on the data is not used" in caplog.text


@pytest.fixture
def head(run, tmp_path):
    draft = tiny.config().draft
    shapes = nn.unbox(head_checkpoint.boxed_params(tiny.TARGET, draft))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
    head_checkpoint.save_head(tmp_path / "head", draft, tiny.TARGET, params, np.arange(64), target_name="tiny")
    return tmp_path / "head"


def evaluation(head, **changes):
    count = {"draft_length": 1, "kappa": 1.4321, "acceptance": [0.43], "tokens": 9, "steps": 6, "answers": 5}
    report = {"temperature": 0.0, "weights": head_checkpoint.read_config(head)["weights"]}
    return files.seal(report | {"files": {"p.jsonl": {"offline": [count], "decoded": [count]}}} | changes)


def test_a_card_is_written_from_the_files_of_the_run(run, head, tmp_path, capsys):
    report = tmp_path / "evaluation.json"
    report.write_text(json.dumps(evaluation(head)))
    assert train.main(["card", "--run", str(run), "--head", str(head), "--evaluation", str(report)]) == 0
    card = (head / "README.md").read_text()
    assert "| p.jsonl | 5 | 1.432 | 0.430 |" in card and "| 12 | 2.200 | 1.500 | 1.625 | 0.500 0.200 0.100 |" in card
    assert "# A draft head for tiny" in card and "Left out: 2 rows of 2 (too <long>)." in card
    assert "| `draft.max_draft_length` | `3` |" in card and "12 of 20 steps" in card
    assert "It was not evaluated" in model_card.write(run, head).read_text()


@pytest.mark.parametrize("changes", [{"weights": "another"}, {"files": []}])
def test_a_card_is_of_one_head(run, head, tmp_path, changes):
    (tmp_path / "e.json").write_text(json.dumps(evaluation(head, **changes)))
    with pytest.raises(UserError, match="is no evaluation of this head: run `train.py evaluate --json"):
        model_card.write(run, head, tmp_path / "e.json")
    assert not (head / "README.md").exists()


def test_seconds_are_told_by_part():
    now, passes = [0.0], []
    times = StepTimes(lambda: now[0])

    def read():
        passes.append(now[0])
        now[0] += 1.0
        return np.ones(1)

    times.time_target(read, passes=2)
    times.time_target(read, passes=2)  # only once
    with times.of("data"):
        now[0] += 0.5
    now[0] += 10.0
    assert times.take(3) == {"data": 0.5, "target": 6.0, "head": 4.0} and len(passes) == 1
    with times.of("checkpoint"):
        now[0] += 2.0
    now[0] += 1.0
    assert times.take(3) == {"data": 0.0, "target": 1.0, "head": 0.0, "checkpoint": 2.0}


def test_weights_and_biases_get_what_the_file_gets(tmp_path, monkeypatch):
    logged, begun = [], {}

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("end")

    def init(**options):
        if options["project"] == "refused":
            raise RuntimeError("no account")
        begun.update(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, __spec__=object()))
    monkeypatch.setattr(boards.importlib.util, "find_spec", lambda name: object() if name == "wandb" else None)
    boards.check_wandb("some")
    folder = tmp_path / "run"
    writer = metrics.MetricsWriter(folder, 0, boards=boards.boards(folder, "some", {"steps": 3}))
    writer.add(2, [METRICS], 10.0, 0.1, {"held_out": {"kappa": 1.5, "sample": [[True, "x"]]}})
    writer.close()
    (step, values), end = logged
    assert (step, end) == (2, "end") and values["held_out/kappa"] == 1.5 and values["slot_loss/2"] == 1.0
    assert begun["project"] == "some" and begun["config"] == {"steps": 3} and begun["resume"] == "allow"
    with pytest.raises(UserError, match="--wandb refused: no account; WANDB_MODE=offline"):
        boards.boards(folder, "refused", {})
    monkeypatch.setattr(boards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        boards.check_wandb("some")
    assert boards.boards(folder, None, {}) == []
