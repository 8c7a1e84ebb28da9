"""The benchmark of verifiers on a tiny model: its figures, and that copies of a row stay copies."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks.verifiers import accuracy, copies, report
from benchmarks.verifiers.__main__ import compare
from specformer_jax.batch import generation
from specformer_jax.config import DraftConfig, SamplingParams, Shape
from specformer_jax.decoding import sampling
from specformer_jax.decoding.verification.kind import BLOCK, Verification
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel
from tests import tiny
from tests.benchmarks.test_benchmarks import Words

HEAD = DraftConfig(max_draft_length=3)
REQUEST = SamplingParams(temperature=1.2, max_new_tokens=12)


def test_every_verification_has_a_row():
    model, params = tiny.make(HEAD)
    lm = LanguageModel("tiny", model, params, Words(), None)
    rows = compare(lm, [[5, 1, 2], [6, 5, 6, 5, 7]], REQUEST, k=3, chains=[2])
    assert [row["verification"] for row in rows] == ["exact", "block-distribution", "fly-lossy", "2 chains"]
    assert [row["reads"] for row in rows] == [4, 4, 4, 8] and "LOSSY" in rows[2]["keeps"]
    for row in rows:
        assert row["passes"] > 0 and row["kappa"] == pytest.approx(1 + sum(row["acceptance"]), abs=2e-3)
    described = {"target": "t", "dtype": "float32", "draft_length": 3, "prompts": 2, "max_new_tokens": 12}
    text = report.markdown(json.loads(json.dumps(described | {"verifiers": rows})))
    assert f"| 1.2 | 2 chains | their distribution | 8 | {rows[3]['kappa']:.2f} | " in text


def test_right_answers_are_counted_beside_the_speed():
    model, params = tiny.make(HEAD)
    lm = LanguageModel("tiny", model, params, Words(), None)  # an answer's last number is its last token
    encoded, request = [[5, 1, 2], [6, 5, 6], [5, 7], [1, 9], [3]], SamplingParams(max_new_tokens=12)
    said = [str(row.token_ids[-1]) for _, row in sorted(generation.generate_ids(lm, encoded, request, draft_length=0))]
    wanted = [*said[:3], "-5", said[4]]
    plain, exact, lossy = accuracy.compare(lm, encoded, wanted, request, k=3, batch_size=2)  # the fifth fills no batch
    assert plain["right"] == exact["right"] == 3 and plain["answers"] == 4
    assert exact["same_number_as_plain"] == 4 and exact["answers_that_part_from_plain"] == 0
    assert plain["kappa"] == 1.0 and lossy["verification"] == "fly-lossy"
    warm = dataclasses.replace(request, temperature=0.8)
    names = [row["verification"] for row in accuracy.compare(lm, encoded, wanted, warm, k=3, batch_size=2)]
    assert names == ["plain", "exact", "block-distribution", "fly-lossy"]
    described = {"target": "t", "dtype": "f", "draft_length": 3, "batch_size": 2}
    found = described | {"max_new_tokens": 12, "ways": [plain, exact, lossy]}
    assert f"| 0.0 | exact | 3 | 4 | 0 | {exact['kappa']:.2f} | " in accuracy.markdown(found)


def test_a_problem_is_a_question_and_a_number(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"question": "How many?", "answer": "7 times 160.\n#### 1,120"}) + "\n")
    assert accuracy.read_problems(str(file)) == [("How many?", "1120")]


def test_a_file_without_problems_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"question": "What?", "answer": "no number"}\n')
    (tmp_path / "n.jsonl").write_text('{"question": "What?", "answer": 7}\n')
    for path in (tmp_path / "p.jsonl", tmp_path / "n.jsonl", tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match="has no problems of GSM8K"):
            accuracy.read_problems(str(path))


def test_copies_go_on_as_one_row():
    """After some passes every copy has in the cache what reading the row anew would put there."""
    model, params = tiny.make(HEAD, verification=Verification(BLOCK))
    n, prompt = 3, [5, 1, 2, 11, 7]
    shape = Shape(n, 4, 64, 96)

    def read(tokens):
        rows = sampling.stack([dataclasses.replace(REQUEST, seed=seed) for seed in range(n)])
        return copies.read_prompt(model, params, shape, rows, tokens)

    state = read(prompt)
    assert len({tuple(np.asarray(chain)) for chain in state.drafts}) > 1, "every copy has drafts of its own"
    for _ in range(6):
        state = copies.several_pass(model, params, state, size=n * 4, chunk=0)
    known = int(state.known[0])
    assert known > len(prompt) + 7 and int(state.accepted[0].sum()) == known - len(prompt) - 7
    assert (np.asarray(state.known) == known).all()
    tokens = np.asarray(state.tokens)[:, :known]
    assert (tokens == tokens[0]).all()
    anew = read(tokens[0, : known - 1].tolist())

    def by_position(pages):  # [P, K, p, H] -> [n, the row's positions, K, H]
        x = np.moveaxis(np.asarray(pages), 1, 2)
        return x.reshape(n, -1, *x.shape[2:])[:, : known - 1]

    for layer, other in zip(state.cache[:2], anew.cache[:2], strict=True):
        for x, y in zip(layer, other, strict=True):
            np.testing.assert_allclose(by_position(x), by_position(y), atol=2e-4)
