"""`trace` shows the answer that `generate` gives, pass by pass, on a tiny model whose drafts are right by chance."""

from types import SimpleNamespace

import pytest

from specformer_jax.batch import generation
from specformer_jax.batch.trace import trace
from specformer_jax.config import DraftConfig, SamplingParams
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel
from tests import tiny

PARAMS = SamplingParams(temperature=2.0, seed=3, max_new_tokens=30)


def test_the_passes_are_the_answer():
    model, params = tiny.make(DraftConfig(max_draft_length=3))
    lm = LanguageModel("tiny", model, params, SimpleNamespace(decode=lambda ids, after=(): str(ids)), None)
    prompt, k = [4, 5, 6], 3
    ((_, answer),) = generation.generate_ids(lm, [prompt], PARAMS, draft_length=k)
    passes = trace(lm, prompt, PARAMS, draft_length=k)
    assert [token for one in passes for token in one.tokens] == answer.token_ids
    assert passes[0].drafts == () and len(passes[0].tokens) == 1
    assert len(passes) - 1 == answer.steps
    assert all(len(one.drafts) == k and one.tokens for one in passes[1:])
    # Where an answer is cut after a draft, that token counts as the pass's own.
    committed_drafts = [sum(min(one.accepted, len(one.tokens) - 1) > j for one in passes[1:]) for j in range(k)]
    assert committed_drafts == answer.accepted_per_position
    assert sum(committed_drafts) > 0, "a test that sees no accepted draft shows little"


def test_only_drafts_that_were_made_are_shown():
    model, params = tiny.make(DraftConfig(drafter="ngram", max_draft_length=3))
    lm = LanguageModel("tiny", model, params, SimpleNamespace(decode=lambda ids, after=(): str(ids)), None)
    passes = trace(lm, [4, 5, 6], PARAMS, draft_length=3)
    assert min(len(one.drafts) for one in passes[1:]) == 0 and all(id >= 0 for one in passes for id in one.drafts)


@pytest.mark.parametrize("prompt", [[], [5] * tiny.CONFIG.context])
def test_prompts_that_do_not_fit_are_refused(prompt):
    model, params = tiny.make(DraftConfig(max_draft_length=3))
    lm = LanguageModel("tiny", model, params, SimpleNamespace(decode=lambda ids, after=(): str(ids)), None)
    with pytest.raises(UserError, match="the prompt"):
        trace(lm, prompt, PARAMS, draft_length=3)
