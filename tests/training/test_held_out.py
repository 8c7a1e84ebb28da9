"""A run is judged by answers that it is not trained on, and its best checkpoint is the best by them."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

import train
from specformer_jax import drafters
from specformer_jax.config import DraftConfig
from specformer_jax.decoding.model import Model
from specformer_jax.decoding.state import BINS
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.nn.mesh import make_mesh
from specformer_jax.nn.target import Target, lm_head
from specformer_jax.planning.calibration import Calibration
from specformer_jax.planning.forecasts import Forecasts, survival_along
from specformer_jax.training import evaluate, fit, metrics, placement
from specformer_jax.training.data.documents import Document
from specformer_jax.training.held_out import HeldOut, HeldOutCounter
from specformer_jax.training.report import run_report
from specformer_jax.training.run import checkpoint
from specformer_jax.training.train_step import Trainer

from . import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")


class _Letters:
    fingerprint = "letters"

    def token_bytes(self, token: int) -> bytes:
        return bytes([97 + token % 26])


def test_drafts_go_where_they_are_likeliest_to_be_right():
    """Of places with one right draft the head is sure, of the others it is not: half a draft a pass finds them all."""
    right = [np.array([1, 0, 1, 0] * 40)]
    confidence = [np.stack([np.where(right[0] > 0, 0.97, 0.03), np.full(160, 0.03)], axis=1)]
    # A pass at place 0 commits two tokens, with its one right draft, so every pass is at a place with one.
    assert Forecasts(right, confidence).kappa_by_budget() == pytest.approx({1: 2.0, 2: 2.0}, abs=0.03)
    blind = Forecasts(right, [np.full((160, 2), 0.5)])
    assert blind.kappa_by_budget()[2] == 2.0
    wrong = Forecasts([np.zeros(20, int)], [np.full((20, 2), 0.5)])
    assert wrong.kappa_by_budget() == {1: 1.0, 2: 1.0}


def test_a_confidence_that_says_what_comes_has_no_calibration_error():
    """Sure to 0.9 of what is right nine times of ten; sure of everything, it learns what that is worth."""
    rng = np.random.default_rng(0)
    sure = [rng.random((400, 1)) for _ in range(40)]
    right = [(rng.random((400, 1)) < each)[:, 0].astype(int) for each in sure]
    assert Forecasts(right, sure).calibration_error()[0] < 0.02
    blind = Forecasts(right, [np.full((400, 1), 0.97)] * 40)
    assert blind.calibration_error()[0] < 0.05 and blind.report()["kappa_by_budget"].keys() == {"1", "2"}
    # What the earlier answers taught does not hold for the later ones.
    turned = [each if number < 20 else 1 - each for number, each in enumerate(right)]
    assert Forecasts(turned, sure).calibration_error()[0] > 0.1


def test_an_answer_is_judged_by_its_own_record_too():
    """A head that is always as sure, of answers where three drafts of ten are right and of others where seven are."""
    rng = np.random.default_rng(0)
    chance = [0.3, 0.7] * 20
    right = [(rng.random(400) < each).astype(int) for each in chance]
    found = Forecasts(right, [np.full((400, 1), 0.5)] * 40)
    assert found.calibration_error()[0] < 0.05
    calibration = Calibration(1, BINS)
    for each, answer in zip(chance, right, strict=True):
        along = survival_along(calibration, answer, np.full((400, 1), 0.5))
        assert along[0] == 0.5 and abs(along[300:].mean() - each) < 0.1


def test_more_drafts_never_bring_less():
    rng = np.random.default_rng(0)
    confidence = [rng.random((60, 3)) for _ in range(5)]
    right = [np.cumprod(rng.random((60, 3)) < sure, axis=1).sum(axis=1) for sure in confidence]
    found = Forecasts(right, confidence)
    by_budget, (most, kappa) = found.kappa_by_budget(), found._spend([np.full(60, 3)] * 5)
    assert most == 3 and 1 < by_budget[1] <= by_budget[2] <= kappa


@pytest.mark.parametrize("sequential", [None, 6])
def test_it_counts_what_evaluate_counts(sequential):
    """The same passes as `evaluate.offline` counts with the same head."""
    draft = dataclasses.replace(tiny.config().draft, sequential_ffn=sequential)
    config = dataclasses.replace(tiny.config(), draft=draft)
    trainer, mesh, ids = Trainer(tiny.TARGET, config), make_mesh(), np.arange(2, 66)
    target = tiny.target_params()
    noise = lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape)
    params = jax.tree.map(noise, placement.init_state(trainer, mesh, 0).params)
    model = Model(Target(tiny.TARGET, draft.hook_layers, "float32"), drafters.make(tiny.TARGET, draft, "float32"))
    vocabulary = {"token_ids": jax.numpy.asarray(ids), "lm_head": lm_head(target)[ids]}
    lm = LanguageModel("tiny", model, {"target": target, "draft": params, "draft_vocab": vocabulary}, None, None)
    first, *documents = tiny.documents(4)
    two_answers = Document("two", first.tokens, ((3, 6), (8, len(first.tokens))), 0.0)
    held_out = HeldOut([two_answers, *documents], tokenizer=_Letters())
    found = HeldOutCounter(trainer, mesh, trainer.freeze(target, ids), ids, held_out).count(params)
    (expected,), forecasts = evaluate.offline(lm, held_out.documents, [3])
    assert found.forecasts.report() == forecasts.report()
    assert found.passes.report() == expected.report() and found.passes.answers == 5
    assert "".join(text for _, text in found.sample) == "".join(chr(97 + t % 26) for t in first.tokens[3:6])
    assert "held out: kappa " in found.line() and found.report()["kappa_by_budget"].keys() == {"1", "2"}


def test_what_cannot_judge_is_refused():
    short = Document.of("a", [3, 4], [5])
    with pytest.raises(UserError, match="no held-out answer has two tokens"):
        HeldOut([short])
    with pytest.raises(UserError, match="--eval-every 0 must be at least 1"):
        HeldOut(tiny.documents(2), 0)
    assert HeldOut(tiny.documents(4)).trained_on(tiny.documents(2)) == 2


def test_a_run_keeps_and_exports_the_best_checkpoint(tmp_path, capsys, caplog):
    """kappa on the held-out answers is highest where the counter says so, whatever the training batches say."""
    run, held_out = tmp_path / "run", HeldOut(tiny.documents(6)[:3], every=3, tokenizer=_Letters())
    inputs = fit.Inputs(tiny.TARGET, tiny.target_params(), tiny.documents(20))
    config = tiny.config(steps=8, checkpoint_every=2, keep_last=1, keep_best=1, log_every=4)
    counts = iter([1.2, 1.9, 1.5, 1.4, 1.3])
    count = HeldOutCounter.count

    def told(self, params):
        found = count(self, params)
        found.passes.tokens = round(next(counts) * found.passes.steps * 1000)
        found.passes.steps *= 1000
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOutCounter, "count", told)
        fit.fit(config, inputs, run, held_out=held_out, progress=False)
    rows = metrics.read(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "held_out" in row] == [2, 3, 4, 6, 8]
    assert {"data", "target", "head"} <= rows[0]["seconds"].keys() and "checkpoint" in rows[-1]["seconds"]
    assert "3 of the 3 held-out prompts are trained on, too" in caplog.text
    assert checkpoint.best(run / "checkpoints") == (4, pytest.approx(1.5, abs=0.01), True)
    assert train.main(["export", "--run", str(run), "--out", str(tmp_path / "head"), "--best"]) == 0
    assert "the head of step 4" in capsys.readouterr().out
    page = run_report.write(run).read_text()
    assert "Held-out answers" in page
    assert not re.search(r"""(src|href)\s*=\s*["']\s*(http|//)""", page)  # it needs nothing from elsewhere


def test_kappas_along_other_answers_are_not_compared(tmp_path):
    saved = {"w": np.ones(2, np.float32)}
    for judged_by, kappas in ((None, {1: 2.9}), ("some", {2: 1.5, 3: 1.4})):
        checkpoints = checkpoint.Checkpoints(tmp_path, keep_last=1, keep_best=1, judged_by=judged_by)
        for step, kappa in kappas.items():
            checkpoints.save(step, saved, {}, kappa)
        checkpoints.close()
    assert checkpoint.best(tmp_path) == (2, 1.5, True)
    with pytest.raises(UserError, match="no checkpoint in .* says what it is worth"):
        checkpoint.best(tmp_path / "none")


def test_answers_of_others_and_steps_without_them(tmp_path, capsys):
    fitting = ["fit", "--config", "configs/tiny.py", "--data", "d", "--run", str(tmp_path)]
    for flags, sentence in (
        (["--eval-every", "5"], "needs --eval-prompts"),
        (["--eval-prompts", "p", "--eval-every", "0"], "--eval-every 0 must be at least 1"),
        (["--wandb", " "], "--wandb is empty"),
    ):
        assert train.main([*fitting, *flags]) == 2 and sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_drafters_are_judged_alike():
    draft = DraftConfig(max_draft_length=3, drafter="eagle").bind(tiny.TARGET)
    trainer = Trainer(tiny.TARGET, dataclasses.replace(tiny.config(), draft=draft))
    mesh = make_mesh()
    params = placement.init_state(trainer, mesh, 0).params
    held_out = HeldOut(tiny.documents(2))
    frozen = trainer.freeze(tiny.target_params(), None)
    found = HeldOutCounter(trainer, mesh, frozen, None, held_out).count(params)
    assert found.passes.answers == 2 and found.sample is None and json.dumps(found.report())
