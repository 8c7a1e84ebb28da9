"""What a run says before it begins adds up, and the samples show what the loss sees."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from specformer_jax.batch.omissions import counts
from specformer_jax.config import DraftConfig
from specformer_jax.training.data.batches import Batches
from specformer_jax.training.data.documents import Document
from specformer_jax.training.report import data_report, samples, step_cost
from specformer_jax.training.train_step import Trainer

from .. import tiny


def document(name: str, prompt: int, answer: int) -> Document:
    return Document.of(name, range(3, 3 + prompt), range(10, 10 + answer))


DOCUMENTS = [
    *(document(f"short {i}", 4, 12) for i in range(6)),
    document("long", 10, 70),  # 16 tokens more than a row has
    document("tiny", 5, 1),
    document("late", 70, 9),
    document("many", 4, 60),  # 59 positions forecast, where a row has 48
    Document("turns", np.arange(3, 43, dtype=np.int32), ((5, 6), (20, 40)), 0.0),
]


def batches(documents=DOCUMENTS):
    return Batches(documents, slots=3, sequence_length=64, rows=4, anchors=48, seed=1)


def test_nothing_of_a_document_vanishes_uncounted():
    packed = batches()
    left_out = {(o.where, o.part): (o.count, o.reason) for o in packed.contents.omissions}
    assert {key: count for key, (count, _) in left_out.items()} == {
        ("long", "token"): 5,  # and 16 of another kind
        ("tiny", "row"): 1,
        ("late", "row"): 1,
        ("many", "token"): 11,
        ("turns", "answer"): 1,
    }
    assert [o.count for o in packed.contents.omissions if o.where == "long"] == [16, 5]
    # Every token of the answers but the first of each is forecast, or is counted.
    contents = packed.contents
    whole = sum(end - begin - 1 for d in DOCUMENTS for begin, end in d.answers)
    beyond = 16 + 5 + 11  # the tokens above, all of them in answers
    no_answer = 9 - 1  # of late
    assert sum(anchors for _, anchors in contents.sizes) == whole - beyond - no_answer
    assert contents.tokens == sum(len(d.tokens) for d in DOCUMENTS)
    assert (contents.answers, contents.answer_tokens) == (12, 6 * 12 + 70 + 1 + 9 + 60 + 21)


def test_the_report_says_what_a_run_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(step_cost, "product_rate", lambda dtype: 1e9)
    monkeypatch.setattr(step_cost, "step_flops", lambda trainer, stored_hooks: 6_000_000_000)
    trainer = Trainer(tiny.TARGET, tiny.config(steps=600))
    about = data_report.describe(trainer, DOCUMENTS, batches(), np.arange(10, 20), 2)
    assert (about.documents, about.steps_per_epoch * 4, about.seconds) == (11, about.rows, 1800)
    assert 0.5 < about.fill <= 1 and about.in_draft_vocabulary == pytest.approx(
        (6 * 10 + 10 + 1 + 9 + 10) / about.answer_tokens
    )
    shown = "\n".join(about.lines())
    assert "11 documents, 12 answers, 365 tokens" in shown and "time: at least 30 min" in shown
    assert "left out 2 rows: no answer of two tokens within the 64 of a packed row" in shown
    about.write(tmp_path)
    kept = json.loads((tmp_path / "data_report.json").read_text())
    assert kept["tokens"] == 365 and kept["left_out"] == counts(about.left_out)
    assert len((tmp_path / "left_out.jsonl").read_text().splitlines()) == len(about.left_out)


def test_a_steps_products_are_counted_as_often_as_loops_turn():
    def body(x):
        y = jax.lax.scan(lambda carry, row: (carry @ carry, row), x, jnp.zeros((5, 2)))[0]
        return jax.jit(lambda z: z[:2] @ z)(y)

    jaxpr = jax.make_jaxpr(body)(jnp.zeros((8, 8))).jaxpr
    assert step_cost._flops(jaxpr) == 5 * 2 * 8**3 + 2 * 2 * 8 * 8


def test_the_shapes_of_a_step_are_those_of_a_run():
    """What is told without a target's weights is what `fit` gives to its step."""
    trainer = Trainer(tiny.TARGET, tiny.config(draft=DraftConfig(max_draft_length=3, draft_vocab_size=64)))
    state, frozen, batch = step_cost.abstract_inputs(trainer, 4, stored_hooks=False)
    frozen_there = jax.eval_shape(lambda: trainer.freeze(tiny.target_params(), np.arange(64)))
    for told, there in ((frozen, frozen_there), (batch, batches()[0])):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), told) == jax.tree.map(lambda x: (x.shape, x.dtype), there)
    assert state.step.shape == ()
    sizes = step_cost.step_bytes(trainer, stored_hooks=False)
    stored = step_cost.step_bytes(trainer, stored_hooks=True)
    assert sizes["target"] == stored["target"] > 0 and stored["hooks"] > sizes["hooks"]  # they come with the batch
    assert sizes["gradient and optimizer"] > 2 * sizes["head"]


class _Letters:
    def token_bytes(self, id: int) -> bytes:
        return bytes([ord("a") + id - 3])


def test_samples_mark_what_is_forecast():
    turns = Document("turns", np.arange(3, 23, dtype=np.int32), ((5, 6), (10, 16)), 0.0)
    for colours, begin, end in ((False, "[[", "]]"), (True, "\x1b[32m", "\x1b[0m")):
        [shown] = samples.samples(batches([turns])[0], _Letters(), colours=colours, count=1)
        assert shown == f"abcdefghijk{begin}lmnop{end}qrst"  # the first token of an answer is the target's own


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_dry_run_reports_and_shows_three_samples(tiny_target, tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    rows = [{"prompt_ids": [1, 5, 2], "response_ids": list(range(7, 20))} for _ in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["anchors=24", "sequence_length=32", "batch_rows=2", "draft.draft_vocab_size=48", f"target={tiny_target}"]
    changes = [word for change in small for word in ("--set", change)]
    arguments = ["fit", "--config", "configs/tiny.py", "--data", str(file), "--run", str(tmp_path / "run"), *changes]
    assert train.main([*arguments, "--tfds", str(tmp_path / "tfds"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("9 documents, 9 answers, 144 tokens, 117 of them in answers, 108 positions that forecast\n")
    assert shown.count("w1w5w2w7[[w8w9w10w11w12w13w14w15w16w17w18w19]]") == 3
    assert sorted(tmp_path.iterdir()) == [file], "it writes nothing"
