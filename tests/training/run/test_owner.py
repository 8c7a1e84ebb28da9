"""A run's folder has one owner, and a run goes on as the one that it was."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest

import train
from specformer_jax import files
from specformer_jax.errors import UserError
from specformer_jax.training import export, metrics
from specformer_jax.training.data.documents import Document
from specformer_jax.training.run import owner, run_record
from specformer_jax.training.run.start import Start

from .. import tiny

DOCUMENTS = tiny.documents(3)


def described(documents=DOCUMENTS, offline=False, **changes):
    return run_record.describe(tiny.config(**changes), tiny.TARGET, documents, np.arange(64), "f1", offline)


def test_a_second_process_learns_who_holds_the_folder(tmp_path):
    folder = tmp_path / "deep" / "run"
    with owner.owned(folder):
        held = f"run is in use by process {os.getpid()} on .* since .*: stop it, or name"
        with pytest.raises(UserError, match=held), owner.owned(folder):
            pytest.fail("two owners")
        for damaged in ("", "{}", "[]"):
            (folder / "holder.json").write_text(damaged)
            with pytest.raises(UserError, match="in use by another process"), owner.owned(folder):
                pytest.fail("two owners")
    with owner.owned(folder):  # whoever ends lets go
        pass
    assert os.listdir(folder) == ["lock"]


def test_a_folder_that_cannot_be_held_is_one_sentence(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="the run cannot be kept in"), owner.owned(tmp_path / "run"):
        pytest.fail("held a file")


def test_the_same_run_goes_on_and_says_what_has_changed(tmp_path):
    run_record.write(tmp_path, described())
    stored = run_record.read(tmp_path)
    assert run_record.check(tmp_path, stored, described()) == []
    changed = run_record.check(tmp_path, stored, described(log_every=7, remat=True, accumulation=2))
    assert changed == ["accumulation: 1 -> 2", "remat: False -> True", "log_every: 1 -> 7"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"learning_rate": 0.001}, "learning_rate"),
        ({"steps": 30}, "steps"),
        ({"seed": 1}, "seed"),
        ({"batch_rows": 8}, "batch_rows"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"target": "other"}, "target"),
        ({"offline": True}, "offline"),
        ({"documents": DOCUMENTS[::-1]}, "data"),
        ({"documents": DOCUMENTS[:2]}, "data"),
        ({"documents": [*DOCUMENTS[:2], DOCUMENTS[2]._replace(answers=((4, 12),))]}, "data"),
    ],
)
def test_what_makes_the_curve_anothers_is_refused_unless_it_is_allowed(tmp_path, changes, field):
    stored, now = described(), described(**changes)
    with pytest.raises(UserError, match=f"{field} .*, not .*say --allow-change {field}, or name another --run"):
        run_record.check(tmp_path, stored, now)
    with pytest.raises(UserError, match=f"--allow-change {field}"):
        run_record.check(tmp_path, stored, now, ["warmup"])
    (said,) = run_record.check(tmp_path, stored, now, [field])
    assert said.startswith(f"{field}: ")


def test_what_the_state_is_made_for_cannot_change(tmp_path):
    plain = tiny.config()
    fewer = dataclasses.replace(plain.draft, max_draft_length=2)
    for changes in ({"optimizer": "muon"}, {"draft": fewer}):
        with pytest.raises(UserError, match="(optimizer adamw, not muon|length 3, not 2): go on with the opt"):
            run_record.check(tmp_path, described(), described(**changes), run_record.CHANGEABLE)


def test_a_record_of_an_earlier_version_says_less(tmp_path):
    stored = {name: value for name, value in described().items() if name not in ("data", "offline")}
    del stored["config"]["log_every"]
    assert run_record.check(tmp_path, stored, described(documents=DOCUMENTS[:1], log_every=9)) == []


def test_data_is_named_by_what_is_trained_on():
    renamed = [Document(f"x{i}", *document[1:]) for i, document in enumerate(DOCUMENTS)]
    assert run_record.digest_of(renamed) == run_record.digest_of(DOCUMENTS)


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"config": {}}', '{"config": [], "target": {}}'])
def test_a_damaged_record_is_one_sentence(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match="is no training run: run.json cannot be read"):
        export.export(tmp_path, tmp_path / "head")
    assert not (tmp_path / "head").exists()


def test_a_record_that_was_changed_is_refused(tmp_path):
    run_record.write(tmp_path, described())
    stored = json.loads((tmp_path / "run.json").read_text())
    for changed in (stored | {"data": "0"}, stored | {"tokenizer": None}):
        (tmp_path / "run.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="run.json is not what was written there"):
            run_record.read(tmp_path)
    without = {name: value for name, value in stored.items() if name != files.SEAL}
    (tmp_path / "run.json").write_text(json.dumps(without | {"target": {"width": 3}}))
    with pytest.raises(UserError, match="run.json describes no head"):
        export.export(tmp_path, tmp_path / "head")


def test_a_run_begins_anew_beside_the_one_before(tmp_path, capsys):
    folder = tmp_path / "run"
    for times in (1, 2):
        (folder / "checkpoints" / "5").mkdir(parents=True)
        run_record.write(folder, described())
        for name in ("data_report.json", "left_out.jsonl", "report.html"):
            (folder / name).write_text("of this run")
        assert Start().stored_run(folder) == described() == Start(must_resume=True).stored_run(folder)
        assert Start(fresh=True).stored_run(folder) is None
        assert str(folder / f"before-{times}") in capsys.readouterr().out
        assert run_record.read(folder / f"before-{times}") == described()
        assert (folder / f"before-{times}" / "checkpoints" / "5").is_dir()
        assert not {"checkpoints", "data_report.json", "left_out.jsonl", "report.html"} & set(os.listdir(folder))
    assert Start().stored_run(folder) is None is Start(fresh=True).stored_run(folder)
    with pytest.raises(UserError, match="no checkpoint in .* to go on from: .* leave out --must-resume"):
        Start(must_resume=True).stored_run(folder)


def test_what_may_change_has_a_name():
    Start(allow_change=("data", "learning_rate", "offline"))
    for wrong in ("draft", "optimizer", "learning-rate", "mesh"):
        with pytest.raises(UserError, match=f"--allow-change {wrong}: it takes one of adam_learning_rate, "):
            Start(allow_change=(wrong,))


def test_a_run_needs_a_folder_of_its_own(tmp_path, capsys):
    arguments = [
        "fit",
        "--config",
        "configs/tiny.py",
        "--data",
        str(tmp_path),
        "--run",
        f"{tmp_path}/../{tmp_path.name}",
    ]
    assert train.main(arguments) == 2
    assert "--run and --data are both" in capsys.readouterr().err and not os.listdir(tmp_path)


def test_a_damaged_line_of_metrics_is_left_out_with_a_warning(tmp_path, caplog):
    rows = [{"step": step, "loss": 1.5} for step in (1, 2, 3)]
    lines = [json.dumps(files.seal(row)) + "\n" for row in rows]
    for damaged in (lines[1].replace("1.5", "1.6"), "{\n", "[]\n", '{"loss": 2}\n', '{"step": "2"}\n'):
        caplog.clear()
        (tmp_path / "metrics.jsonl").write_text(lines[0] + damaged + lines[2])
        assert metrics.read(tmp_path / "metrics.jsonl") == [rows[0], rows[2]]
        assert "metrics.jsonl, line 2 is left out" in caplog.text
