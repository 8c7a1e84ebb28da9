"""`trace` shows the answer that `generate` gives, pass by pass, on a tiny model whose drafts are right by chance."""

from types import SimpleNamespace

import tiny

from specformer_jax import generation
from specformer_jax.config import DraftConfig, SamplingParams
from specformer_jax.loading import LanguageModel
from specformer_jax.trace import trace

PARAMS = SamplingParams(temperature=2.0, seed=3, max_new_tokens=30)


def test_the_passes_are_the_answer():
    model, params = tiny.make(DraftConfig(max_draft_length=3))
    lm = LanguageModel("tiny", model, params, SimpleNamespace(decode=str), None)
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
