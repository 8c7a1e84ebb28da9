"""The Mosaic GPU bodies for Hopper, simulated by JAX, against float64 numpy and the references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as simulator
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode

from pallas_kernels import lowering_for, mixed_mask_attention, ragged_attention, sample_hidden, sample_logits
from pallas_kernels.sampling.hopper import _log1p
from tests.kernels.kernel_inputs import attention_case, dense_attention, dense_ragged, flat_case, in_pages

ROWS = [(130, 5), (60, 8), (0, 3), (127, 1), (64, 2)]  # windows in the last tile of their context, and over its edge
EDGES = [-1, 0, 60, 63, 64, 124]  # an empty row, one that begins, tile edges, a full one


def _simulated(function, *operands, **keywords):
    with lowering_for("cuda", interpret=True):
        run = jax.jit(lambda operands, keywords: function(*operands, **keywords, implementation="mosaic_gpu"))
        return jax.block_until_ready(run(operands, keywords))


def _check_flat(flat, tile):
    attend = functools.partial(ragged_attention, tile=tile)
    out, pages = _simulated(attend, *flat)
    expected, written = dense_ragged(*flat)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())
    jax.tree.map(lambda a, e: np.testing.assert_array_equal(np.asarray(a, np.float64), e), pages, tuple(written))


def test_windows():
    _check_flat(flat_case(1, [(126, 5), (0, 3)], p=64, tables=3, N=3, K=1, H=64, dtype=jnp.bfloat16), 5)


@pytest.mark.slow
@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize(("N", "K", "tile"), [(4, 4, 8), (3, 1, 30), (8, 2, 1), (8, 1, 12)])
def test_heads_and_tiles(H, N, K, tile):
    """Groups of 1, 3, 4 and 8; a chunk of a prompt in several tiles of queries, each row's page in two parts."""
    rows = [(20, 40), *ROWS]
    _check_flat(flat_case(2, rows, p=128, tables=2, N=N, K=K, H=H, dtype=jnp.bfloat16), tile)


@pytest.mark.slow
def test_nothing_dead_is_read():
    case = attention_case(3, B=6, C=128, N=8, H=64, start=EDGES, dtype=jnp.bfloat16)
    q, context, _ = case.dirty
    start = case.keywords["start"]
    pages, table = in_pages(0, context, np.where(start < 0, 0, start + q.shape[1]), 64)
    out = _simulated(mixed_mask_attention, q, pages, start=start, table=table)
    expected = dense_attention(*case.clean, **case.keywords)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())


def _sampled(seed, R, V, D, temperatures):
    """Small integers make every product exact, so even ties must agree."""
    rng = np.random.default_rng(seed)
    hidden, head = (jnp.asarray(rng.integers(-2, 3, shape), jnp.bfloat16) for shape in ((R, D), (V, D)))
    rows = dict(
        seed=jnp.asarray(rng.integers(0, 2**32, R), jnp.uint32),
        position=jnp.asarray(rng.integers(0, 10**6, R), jnp.int32),
        temperature=jnp.asarray(rng.choice(temperatures, R), jnp.float32),
    )
    ids = jnp.asarray(np.sort(rng.choice(5000, V, replace=False)), jnp.int32)
    return (hidden, head), rows, ids


def _check_samples(operands, **keywords):
    sample = functools.partial(sample_hidden, confidence=True)
    actual, expected = _simulated(sample, *operands, **keywords), sample(*operands, **keywords, implementation="xla")
    np.testing.assert_array_equal(actual.token, expected.token)
    np.testing.assert_allclose(actual.confidence, expected.confidence, rtol=2e-6)


def test_samples_of_a_pruned_vocabulary():
    operands, rows, ids = _sampled(4, 5, 300, 128, [0.0, 0.3, 1.0])
    _check_samples(operands, token_ids=ids, **rows)


@pytest.mark.slow
@pytest.mark.parametrize(("R", "V", "D"), [(1, 60, 64), (64, 128, 192), (130, 257, 320)])
@pytest.mark.parametrize("temperatures", [[0.0], [0.0, 0.3, 1.0, 2.0]])
def test_samples_of_any_size(R, V, D, temperatures):
    operands, rows, _ = _sampled(5, R, V, D, temperatures)
    _check_samples(operands, **rows)


@pytest.mark.slow
def test_no_race_in_simulated_memory():
    """Memory that was never written is NaN, a copy that nobody awaits is an error, and threads keep vector clocks."""
    params = InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized")
    operands, rows, _ = _sampled(6, 5, 200, 320, [1.0])
    with force_gpu_interpret_mode(params):
        _check_samples(operands, **rows)
        assert not simulator.get_races().races_found
        _check_flat(flat_case(7, ROWS, p=64, tables=3, N=4, K=1, H=128, dtype=jnp.bfloat16), 5)
        assert not simulator.get_races().races_found


def test_the_logarithm_of_the_noise():
    """Near 0, where the winners of an argmax come from, to the last bits of a float32."""
    v = np.concatenate([np.geomspace(2.0**-33, 0.5, 10**5), 1 - np.geomspace(2.0**-24, 0.5, 10**5)]).astype(np.float32)
    exact = np.log1p(-v.astype(np.float64))
    np.testing.assert_allclose(jax.jit(_log1p)(-v), exact, rtol=4e-7)


_PAGES, _QUERIES, _TABLE = (3, 2, 64, 64), (1, 2, 4, 64), jnp.zeros((1, 2), jnp.int32)


@pytest.mark.parametrize(
    ("q", "pages", "dtype", "table", "reason"),
    [
        (_QUERIES, _PAGES, jnp.float32, _TABLE, "take bfloat16 alone"),
        ((1, 2, 4, 80), (3, 2, 64, 80), jnp.bfloat16, _TABLE, "64 or 128 wide, not 80"),
        (_QUERIES, (3, 2, 32, 64), jnp.bfloat16, _TABLE, "pages hold 32 positions"),
        ((1, 2, 160, 64), _PAGES, jnp.bfloat16, _TABLE, "80 query heads share"),
        (_QUERIES, (1, 2, 64, 64), jnp.bfloat16, None, "only attention over pages"),
    ],
)
def test_attention_that_has_no_such_body(q, pages, dtype, table, reason):
    operands = jnp.zeros(q, dtype), (jnp.zeros(pages, dtype),) * 2
    with lowering_for("cuda"), pytest.raises(NotImplementedError, match=f"'mosaic_gpu' cannot run: .*{reason}"):
        mixed_mask_attention(*operands, start=jnp.zeros(1, jnp.int32), table=table, implementation="mosaic_gpu")


def test_sampling_that_has_no_such_body():
    rows = dict(seed=jnp.zeros(1, jnp.uint32), position=jnp.zeros(1, jnp.int32), temperature=jnp.zeros(1))
    named = dict(implementation="mosaic_gpu", **rows)
    with lowering_for("cuda"):
        with pytest.raises(NotImplementedError, match="logits are given"):
            sample_logits(jnp.zeros((1, 64), jnp.bfloat16), **named)
        with pytest.raises(NotImplementedError, match="bfloat16 alone"):
            sample_hidden(jnp.zeros((1, 64)), jnp.zeros((8, 64)), **named)
        with pytest.raises(NotImplementedError, match="96 wide"):
            sample_hidden(jnp.zeros((1, 96), jnp.bfloat16), jnp.zeros((8, 96), jnp.bfloat16), **named)
