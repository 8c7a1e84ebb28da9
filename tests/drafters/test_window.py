"""Heads that look back over a window: what they read, whole sequences and flat batches alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Places
from specformer_jax.config import DraftConfig, SamplingParams
from specformer_jax.drafters.dflash import DFlash, Span
from specformer_jax.errors import UserError
from specformer_jax.nn import cache as cache_lib
from specformer_jax.training.config import TrainConfig
from tests import tiny

HEAD = DraftConfig(max_draft_length=3, next_token_hook=True)
T = 5 * cache_lib.page_size() + 3


def sequence(seed=0):
    """Hooks of a sequence, and the token after each position."""
    hooks = jax.random.normal(jax.random.key(seed), (1, T, 4, tiny.CONFIG.width))
    return hooks, jnp.arange(T)[None] % 11 + 1


def whole(window, hooks, following):
    """The contexts of a whole sequence, and its keys and values."""
    model, params = tiny.make(dataclasses.replace(HEAD, window=window))
    return model.observe(params, hooks, following, None, (None,))


@pytest.mark.parametrize("window", [1, 2, 16, 17, 18, 33])
def test_a_flat_batch_reads_what_a_whole_sequence_reads(window):
    """Page by page: the window of a page's first token is that of the page in a whole sequence."""
    model, params = tiny.make(dataclasses.replace(HEAD, window=window))
    p, (hooks, following) = cache_lib.page_size(), sequence()
    cache, table, contexts = (model.drafter.memory(9),), jnp.array([[7, 2, 5, 0, 8, 3]]), []
    for begin in range(0, T, p):
        here = slice(begin, min(begin + p, T))
        position = jnp.arange(here.start, here.stop)
        places = Places(jnp.zeros_like(position), position, table, longest=p)
        context, cache = model.observe(params, hooks[0, here], following[0, here], places, cache)
        contexts.append(context)
    expected, _ = whole(window, hooks, following)
    np.testing.assert_allclose(jnp.concatenate(contexts), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 17, 33, T])
def test_what_lies_before_the_window_is_not_read(window):
    """The last position's context depends on the first one within its page-wide window, and on none before."""
    p, (hooks, following) = cache_lib.page_size(), sequence()
    last = T - 1
    begin = max(last // p * p - -(-(window - 1) // p) * p, 0)

    def depends(at):
        """How much the last context changes with the hooks at a position."""
        changed = lambda x: whole(window, hooks.at[0, at].add(x), following)[0][0, last].sum()
        return jax.jacobian(changed)(0.0)

    assert depends(begin) != 0
    assert begin == 0 or depends(begin - 1) == 0


def test_a_window_as_long_as_the_sequence_changes_nothing():
    hooks, following = sequence()
    np.testing.assert_array_equal(whole(T, hooks, following)[0], whole(None, hooks, following)[0])


def test_keys_and_values_do_not_hang_on_the_window():
    hooks, following = sequence()
    jax.tree.map(np.testing.assert_array_equal, whole(2, hooks, following)[1], whole(None, hooks, following)[1])


@functools.cache
def dflash(spans):
    """A DFlash head of two layers with the parameters that one without windows has."""
    config = dataclasses.replace(HEAD, next_token_hook=False, draft_blocks=2, drafter="dflash")
    model, params = tiny.make(config)
    head = DFlash(tiny.CONFIG, model.drafter.config, "float32", spans=spans)
    return head, {"params": params["draft"]}


def whole_blocks(spans, hooks, following):
    """The slots at every position of a whole sequence."""
    head, params = dflash(spans)
    return head.apply(params, hooks[:, :, :1].repeat(len(head.config.hook_layers), 2), embedded(following))[0]


def embedded(following):
    return jax.random.normal(jax.random.key(9), (13, tiny.CONFIG.width))[following]


SPANS = [
    (Span(17, False), Span()),
    (Span(4, True), Span(33, False)),
    (Span(16, True), Span(16, True)),
    (Span(None, False), Span(18, True)),
]


@pytest.mark.parametrize("spans", SPANS)
def test_blocks_over_pages_read_what_those_of_a_whole_sequence_read(spans):
    """The anchors of a page, over a cache in pages: the window of its first one is theirs in a whole sequence."""
    (head, params), p, (hooks, following) = dflash(spans), cache_lib.page_size(), sequence()
    expected = whole_blocks(spans, hooks, following)
    hooks = hooks[0, :, :1].repeat(len(head.config.hook_layers), 1)
    table = jnp.array([[7, 2, 5, 0, 8, 3]])
    places = Places(jnp.zeros(T, jnp.int32), jnp.arange(T), table, longest=T)
    read = functools.partial(head.apply, params, method="context")
    context, memory = read(hooks, embedded(following)[0], head.memory(9), places)
    for begin in range(0, T, p):
        here = slice(begin, min(begin + p, T))
        before = lambda j, slot, here=here: embedded(following)[:, here]
        arguments = (context[None, here], memory, jnp.array([begin]), before, head.config.max_draft_length)
        slots = head.apply(params, *arguments, table=table, method="forecast")
        np.testing.assert_allclose(slots[0], expected[here], rtol=1e-4, atol=1e-4)


def test_same_tokens_with_windows_in_a_mixed_batch():
    """Rows of unlike lengths, one of them empty, greedy and sampled, past a window of one page."""
    prompts, requests = (
        [[1, 5, 2, 7], None, [4] * 29],
        [SamplingParams(), SamplingParams(), SamplingParams(0.8, seed=5)],
    )
    model, params = tiny.make(dataclasses.replace(HEAD, next_token_hook=False, draft_blocks=2, drafter="dflash"))
    windowed = dataclasses.replace(model, drafter=dflash((Span(4, False), Span(17, True)))[0])
    expected, _ = tiny.answers(model, params, prompts, requests, k=0)
    got, state = tiny.answers(windowed, params, prompts, requests, k=3)
    assert got == expected and max(map(len, got)) == 40
    _, unlike = tiny.answers(model, params, prompts, requests, k=3)
    assert not np.array_equal(state.steps, unlike.steps), "the windows have changed no draft"


@pytest.mark.parametrize("spans", SPANS)
def test_what_lies_before_every_window_of_a_block_is_not_read(spans):
    """A block depends on the first position of the widest window, in whole pages, and on none before."""
    p, (hooks, following) = cache_lib.page_size(), sequence()
    windows = [span.window for span in spans]
    behind = T if None in windows else -(-(max(windows) - 1) // p) * p
    begin = max((T - 1) // p * p - behind, 0)

    def depends(at):
        changed = lambda x: whole_blocks(spans, hooks.at[0, at, :, 0].add(x), following)[-1].sum()
        return jax.jacobian(changed)(0.0)

    assert abs(depends(begin)) > 1e-6
    assert begin == 0 or depends(begin - 1) == 0


def test_a_drafter_that_has_no_window_may_be_trained_on_longer_sequences():
    draft = dataclasses.replace(HEAD, drafter="eagle", window=8)
    assert TrainConfig(draft=draft, sequence_length=16).bind(tiny.CONFIG).sequence_length == 16


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda: dataclasses.replace(HEAD, window=0).bind(tiny.CONFIG), "window 0 must be a whole number from 1"),
        (lambda: dataclasses.replace(HEAD, window=8, attends_context=True).bind(tiny.CONFIG), "leave window or"),
        (
            lambda: TrainConfig(draft=dataclasses.replace(HEAD, window=511), sequence_length=512),
            "window 511 is shorter",
        ),
    ],
)
def test_windows_that_cannot_be(change, sentence):
    with pytest.raises(UserError, match=sentence):
        change()
