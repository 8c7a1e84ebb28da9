"""An engine's configuration over the tiny model, requests for it, and what the model answers."""

import contextlib
import functools
import threading
import time

from specformer_jax.config import SamplingParams
from specformer_jax.engine import EngineConfig
from specformer_jax.engine.request import Request
from tests.engine import tiny_lm

PAGE = 16  # positions of a page on a CPU
CONFIG = EngineConfig(rows=4, max_context=76, chunk=16, max_queue=64, budgets=(1, 4, 8, 20))
KINDS = [
    SamplingParams(max_new_tokens=24),
    SamplingParams(temperature=0.7, top_p=0.9, min_p=0.05, seed=1, max_new_tokens=24),
    SamplingParams(temperature=1.3, top_k=4, seed=2**32 - 1, max_new_tokens=17),
    SamplingParams(temperature=1.0, seed=7, max_new_tokens=1),
]
LONG = (6, 5) * 24  # three pages, three chunks
PROMPTS = [(5, 1, 2, 11, 7), (4,), tuple(range(4, 12)), LONG[:18], LONG, (*LONG[:30], 1, 2)]
ENDLESS = Request((5, 1, 2), SamplingParams(temperature=1.2, seed=5, max_new_tokens=73))


@functools.cache
def expected(prompt, params):
    return tiny_lm.naive(tiny_lm.make(), prompt, params)


def ids(handle) -> list[int]:
    return [token.id for delta in handle for token in delta.tokens]


def wait_idle(engine):
    """Until every row is free; a row or a page that leaks fails here."""
    until = time.monotonic() + 60
    while engine.stats().running or engine.stats().queued:
        assert time.monotonic() < until, engine.stats()
        time.sleep(0.005)
    assert engine.stats().free_pages == engine.stats().pages


@contextlib.contextmanager
def held(engine, request=ENDLESS):
    """The engine stands still at its next call until the block ends; at least one request must be there."""
    reached, go = threading.Event(), threading.Event()
    advance = engine.compiled_steps.advance

    def waiting(*arguments):
        reached.set()
        assert go.wait(60)
        return advance(*arguments)

    engine.compiled_steps.advance = waiting
    first = engine.submit(request)
    assert reached.wait(60)
    try:
        yield first
    finally:
        engine.compiled_steps.advance = advance
        go.set()
