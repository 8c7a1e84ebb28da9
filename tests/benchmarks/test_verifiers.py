"""The benchmark of verifiers on a tiny model: its figures, and that copies of a row stay copies."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks.verifiers import copies, report
from benchmarks.verifiers.__main__ import compare
from specformer_jax.config import DraftConfig, SamplingParams, Shape
from specformer_jax.decoding import sampling
from specformer_jax.decoding.verification.kind import BLOCK, Verification
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
