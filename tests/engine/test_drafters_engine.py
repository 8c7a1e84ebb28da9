"""The other drafters in the engine: what they keep of a row lies in its pages, or is nothing at all."""

import dataclasses

import pytest

from specformer_jax.config import DraftConfig, SamplingParams
from specformer_jax.decoding.state import BINS
from specformer_jax.engine import Engine, EngineConfig
from specformer_jax.engine.request import Request
from specformer_jax.planning.calibration import Calibration
from specformer_jax.planning.planner import FixedDrafts
from tests import tiny
from tests.engine import tiny_lm


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["ngram", "logitspec", "eagle", "dflash", "kv"])
def test_the_engine_drafts_with_any_drafter(drafter):
    base = tiny_lm.make()
    model, params = tiny.make(DraftConfig(max_draft_length=4, draft_blocks=2, drafter=drafter))
    lm = dataclasses.replace(base, model=model, params=params | {"target": base.params["target"]})
    prompt, sampling_params = (6, 5, 4, 7) * 5, SamplingParams(max_new_tokens=24)
    config = EngineConfig(rows=2, max_context=76, chunk=16, cache_positions=160)
    with Engine(lm, config, FixedDrafts(4, Calibration(4, BINS))) as engine:
        for _ in range(2):  # the second time from pages that are kept
            handles = [engine.submit(Request(prompt, sampling_params)) for _ in range(2)]
            got = [[token.id for delta in handle for token in delta.tokens] for handle in handles]
            assert got == [tiny_lm.naive(base, prompt, sampling_params)] * 2
        assert engine.stats().accepted_tokens > 0 and engine.stats().cached_tokens > 0
