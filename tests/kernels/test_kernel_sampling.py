"""Sampling: the kernels say what the reference says, noise is noise, thresholds are transformers' warpers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import accept, cpu, gumbel, logit_threshold, lowering_for, sample_hidden, sample_logits, tuning
from tests.kernels.kernel_inputs import drawn

NATIVE = [] if cpu.unavailable() else ["native"]
BODIES = ["tpu", "cuda", *NATIVE]
SMALL = tuning.SampleBlocks(rows=16, columns=128, depth=16)


def _rows(rng, R):
    return dict(
        seed=jnp.asarray(rng.integers(0, 2**32, R), jnp.uint32),
        position=jnp.asarray(rng.integers(0, 10**6, R), jnp.int32),
        temperature=jnp.asarray(rng.choice([0.0, 0.3, 1.0, 2.0], R), jnp.float32),
    )


def _rows_and_threshold(rng, R):
    return _rows(rng, R) | dict(threshold=jnp.asarray(rng.choice([-np.inf, 0.0, 1.5], R), jnp.float32))


def _tied_logits(rng, R, V):
    """Few distinct values, so that greedy rows tie all over; some tokens are ruled out; one row holds only -inf."""
    logits = rng.integers(-6, 7, (R, V)) / 2.0
    logits[rng.random((R, V)) < 0.2] = -np.inf
    logits[0, : V - 1] = -np.inf
    logits[1] = -np.inf
    return jnp.asarray(logits, jnp.float32)


def _agree(function, platform, *operands, **keywords):
    """The kernel's tokens are the reference's."""
    run = lambda implementation: jax.jit(
        lambda operands, keywords: function(*operands, **keywords, implementation=implementation)
    )(operands, keywords)
    expected = run("xla")
    if platform == "native":
        actual = run("native")
    else:
        with lowering_for(platform, interpret=True), tuning.using(SMALL):
            actual = run("pallas")
    np.testing.assert_array_equal(actual.token, expected.token)
    return expected


@pytest.mark.parametrize("platform", BODIES)
def test_ten_thousand_verifications(platform):
    """Ties, -inf, a vocabulary that is no multiple of a tile, all-rejected and all-accepted rows."""
    rng = np.random.default_rng(0)
    B, W, V = 2000, 5, 333  # 10,000 rows, 2,000 windows
    keywords = _rows_and_threshold(rng, B * W)
    tokens = _agree(sample_logits, platform, _tied_logits(rng, B * W, V), **keywords).token.reshape(B, W)
    right = np.cumprod(rng.random((B, W - 1)) < 0.7, axis=1)
    right[:10], right[10:20] = 0, 1
    drafts = np.where(right, tokens[:, :-1], (tokens[:, :-1] + 1) % V)
    drafts[20:30, 2] = -1
    verdict = jax.jit(accept)(jnp.asarray(drafts), tokens)
    for b in range(B):
        a = 0
        while a < W - 1 and drafts[b, a] == tokens[b, a]:
            a += 1
        assert (verdict.accepted[b], verdict.token[b]) == (a, tokens[b, a]) if b < 200 else True
    expected = (drafts == np.asarray(tokens[:, :-1])).cumprod(axis=1).sum(axis=1)
    np.testing.assert_array_equal(verdict.accepted, expected)
    assert set(np.asarray(verdict.accepted[:10])) == {0} and set(np.asarray(verdict.accepted[10:20])) == {W - 1}


@pytest.mark.parametrize("platform", BODIES)
@pytest.mark.parametrize("mapped", [False, True])
def test_from_hidden_states(platform, mapped):
    """Small integers make every product exact, so even ties must agree."""
    rng = np.random.default_rng(1)
    R, V, D = 37, 300, 24
    hidden, head = (jnp.asarray(rng.integers(-2, 3, shape), jnp.float32) for shape in ((R, D), (V, D)))
    ids = jnp.asarray(np.sort(rng.choice(5000, V, replace=False)), jnp.int32) if mapped else None
    sample = _agree(sample_hidden, platform, hidden, head, token_ids=ids, **_rows(rng, R))
    assert not mapped or np.isin(sample.token, ids).all()


def test_greedy_takes_the_lowest_of_equals():
    logits = jnp.zeros((3, 400)).at[0, 350].set(1.0).at[2, 7].set(1.0).at[2, 300].set(1.0)
    rows = dict(seed=jnp.zeros(3, jnp.uint32), position=jnp.zeros(3, jnp.int32), temperature=jnp.zeros(3))
    np.testing.assert_array_equal(_agree(sample_logits, "tpu", logits, **rows).token, [350, 0, 7])


@pytest.mark.slow
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 400), st.sampled_from(["tpu", "cuda", *NATIVE]))
@drawn(20)
def test_any_size(seed, R, V, platform):
    rng = np.random.default_rng(seed)
    _agree(sample_logits, platform, _tied_logits(rng, R, V), **_rows_and_threshold(rng, R))


def test_no_race_in_simulated_tpu_memory():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    rng = np.random.default_rng(2)
    R, V, D = 20, 300, 16
    hidden, head = (jnp.asarray(rng.integers(-2, 3, shape), jnp.float32) for shape in ((R, D), (V, D)))
    rows = _rows(rng, R)
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with lowering_for("tpu"), tuning.using(SMALL), pltpu.force_tpu_interpret_mode(params):
        run = jax.jit(lambda h, w: sample_hidden(h, w, **rows, confidence=True, implementation="pallas"))
        sample = jax.block_until_ready(run(hidden, head))
    assert not simulator.races.races_found
    expected = sample_hidden(hidden, head, **rows, confidence=True)
    np.testing.assert_array_equal(sample.token, expected.token)
    np.testing.assert_allclose(sample.confidence, expected.confidence, rtol=1e-6)


def test_noise_is_what_it_is_keyed_by():
    noise = jax.jit(gumbel)
    a = noise(jnp.uint32(5), jnp.arange(64)[:, None], jnp.arange(500)[None])
    np.testing.assert_array_equal(a[7, 11], noise(jnp.uint32(5), jnp.int32(7), jnp.int32(11)))
    assert np.isfinite(a).all()
    b = noise(jnp.uint32(6), jnp.arange(64)[:, None], jnp.arange(500)[None])
    assert abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]) < 0.03
    assert abs(np.corrcoef(np.ravel(a[1:]), np.ravel(a[:-1]))[0, 1]) < 0.03
    assert abs(np.corrcoef(np.ravel(a[:, 1:]), np.ravel(a[:, :-1]))[0, 1]) < 0.03


def test_noise_is_gumbel():
    """Kolmogorov-Smirnov against exp(-exp(-x)) over seeds, positions and tokens, and the upper tail by itself."""
    noise = jax.jit(gumbel)(
        jnp.arange(8, dtype=jnp.uint32)[:, None, None], jnp.arange(50)[:, None], jnp.arange(2500)[None]
    )
    x = np.sort(np.ravel(noise).astype(np.float64))
    n = len(x)
    distance = np.abs(np.exp(-np.exp(-x)) - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.95 / np.sqrt(n)  # p > 0.001
    expected = n * -np.expm1(-np.exp(-10.0))
    assert abs((x > 10).sum() - expected) < 4 * np.sqrt(expected)


def test_every_input_bit_flips_half_of_the_noise_bits():
    from pallas_kernels.noise import noise_bits, row_keys

    rng = np.random.default_rng(3)
    n = 4096
    seed, position, token = (jnp.asarray(rng.integers(0, 2**31, n)) for _ in range(3))

    @jax.jit
    def bits(seed, position, token):
        return noise_bits(row_keys(seed.astype(jnp.uint32), position.astype(jnp.int32)), token.astype(jnp.int32))

    base = bits(seed, position, token)
    for which in range(3):
        for bit in range(31 if which else 32):
            changed = [seed, position, token]
            changed[which] = (changed[which].astype(jnp.uint32) ^ jnp.uint32(1 << bit)).astype(jnp.uint32)
            flipped = np.unpackbits(np.asarray(base ^ bits(*changed)).view(np.uint8).reshape(n, 4), axis=1)
            assert abs(flipped.mean() - 0.5) < 0.01, (which, bit)
            assert np.abs(flipped.mean(axis=0) - 0.5).max() < 0.06, (which, bit)


def test_samples_follow_the_softmax():
    logits = jnp.asarray([0.0, 1.0, 2.0, -1.0, 0.5])
    n = 20000
    rows = dict(seed=jnp.full(n, 9, jnp.uint32), position=jnp.arange(n), temperature=jnp.full(n, 0.8))
    token = sample_logits(jnp.broadcast_to(logits, (n, 5)), **rows).token
    expected = jax.nn.softmax(logits / 0.8)
    np.testing.assert_allclose(np.bincount(token, minlength=5) / n, expected, atol=4 * 0.5 / np.sqrt(n))


def _warped(logits, temperature, top_k, top_p, min_p):
    """transformers' warpers in their order, on one row in float64; ties with the last token kept are kept too."""
    x = np.asarray(logits, np.float64) / temperature
    keep = np.ones(len(x), bool)
    if 0 < top_k < len(x):
        keep &= x >= np.sort(x)[-top_k]
    if top_p < 1:
        p = np.where(keep, np.exp(x - x.max()), 0)
        p /= p.sum()
        order = np.sort(p)[::-1]
        last = order[np.searchsorted(np.cumsum(order), top_p * (1 - 1e-9))]
        keep &= p >= last
    if min_p > 0:
        keep &= x >= x.max() + np.log(min_p)
    return keep


@pytest.mark.parametrize("V", [7, 1000])
def test_threshold_is_the_warpers(V):
    rng = np.random.default_rng(4)
    R = 60
    logits = np.round(rng.standard_normal((R, V)) * 3, 1).astype(np.float32)  # rounded: ties
    temperature = rng.choice([0.5, 1.0, 1.7], R)
    top_k, top_p, min_p = rng.choice([0, 1, 5, 50], R), rng.choice([1.0, 0.9, 0.31], R), rng.choice([0.0, 0.07], R)
    threshold = jax.jit(logit_threshold)(
        jnp.asarray(logits),
        temperature=jnp.asarray(temperature, jnp.float32),
        top_k=jnp.asarray(top_k, jnp.int32),
        top_p=jnp.asarray(top_p, jnp.float32),
        min_p=jnp.asarray(min_p, jnp.float32),
    )
    for r in range(R):
        keep = _warped(logits[r], temperature[r], top_k[r], top_p[r], min_p[r])
        np.testing.assert_array_equal(logits[r] >= threshold[r], keep, err_msg=str((top_k[r], top_p[r], min_p[r])))


def test_greedy_rows_and_switched_off_rows_have_no_threshold():
    off = dict(top_k=jnp.array([0, 3]), top_p=jnp.array([1.0, 0.5]), min_p=jnp.array([0.0, 0.5]))
    threshold = logit_threshold(jnp.arange(10.0).reshape(2, 5), temperature=jnp.array([1.0, 0.0]), **off)
    np.testing.assert_array_equal(threshold, [-np.inf, -np.inf])


@pytest.mark.parametrize("platform", BODIES)
def test_a_threshold_above_every_token_leaves_column_zero(platform):
    rows = dict(seed=jnp.zeros(2, jnp.uint32), position=jnp.zeros(2, jnp.int32), temperature=jnp.ones(2))
    sample = _agree(sample_logits, platform, jnp.ones((2, 3)), threshold=jnp.full(2, 9.0), **rows)
    np.testing.assert_array_equal(sample.token, [0, 0])


def _largest_probability(logits):
    """The confidence in float64; 0 for rows of -inf."""
    x = np.asarray(logits, np.float64)
    top = x.max(axis=1, keepdims=True)
    mass = np.exp(x - np.where(top > -np.inf, top, 0.0)).sum(axis=1)
    return np.divide(1.0, mass, out=np.zeros_like(mass), where=mass > 0)


def _check_confidence(function, platform, logits, *operands, rtol, **keywords):
    """The implementation's confidence is the oracle's, and its token the same with it and without."""
    run = lambda **asked: jax.jit(lambda operands, keywords: function(*operands, **keywords, **asked))(
        operands, keywords
    )
    lowered_for = "cpu" if platform in ("reference", "native") else platform
    with lowering_for(lowered_for, interpret=lowered_for != "cpu", native=platform == "native"), tuning.using(SMALL):
        without, asked = run(), run(confidence=True)
    assert without.confidence is None and asked.confidence.dtype == jnp.float32
    np.testing.assert_array_equal(asked.token, without.token)
    np.testing.assert_allclose(asked.confidence, _largest_probability(logits), rtol=rtol)
    assert (asked.confidence <= 1).all()


def _greedy_first(rows):
    """The first tile of rows is all greedy, the others are mixed."""
    return rows | dict(temperature=rows["temperature"].at[: SMALL.rows].set(0.0))


IMPLEMENTATIONS = pytest.mark.parametrize("platform", ["reference", *BODIES])


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "R, V, dtype", [(37, 333, jnp.float32), (37, 333, jnp.bfloat16), (6, 5, jnp.float32), (32, 256, jnp.float32)]
)
def test_confidence_of_logits(platform, R, V, dtype):
    """Thresholds and temperatures, which rule tokens out and flatten, do not change it."""
    rng = np.random.default_rng(5)
    logits = np.where(rng.random((R, V)) < 0.2, -np.inf, rng.standard_normal((R, V)) * 4)
    logits[0, : V - 1] = -np.inf  # the first tiles hold nothing
    logits[1] = -np.inf
    logits[2] = 3.0 * np.arange(V)  # each tile outweighs all before it
    logits[3] = logits[2, ::-1]
    logits[4] = -1e30
    logits[5] = rng.permutation(V) * 1e30
    logits = jnp.asarray(logits, dtype)
    rows = _greedy_first(_rows_and_threshold(rng, R))
    _check_confidence(sample_logits, platform, logits, logits, rtol=1e-6, **rows)


@IMPLEMENTATIONS
@pytest.mark.parametrize("mapped, dtype", [(False, jnp.float32), (True, jnp.bfloat16)])
def test_confidence_from_hidden_states(platform, mapped, dtype):
    rng = np.random.default_rng(6)
    R, V, D = 37, 300, 24
    hidden, head = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((R, D), (V, D)))
    ids = jnp.asarray(rng.permutation(5000)[:V], jnp.int32) if mapped else None
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    rows = _greedy_first(_rows(rng, R))
    _check_confidence(sample_hidden, platform, logits, hidden, head, rtol=2e-5, token_ids=ids, **rows)


def test_confidence_of_a_large_flat_vocabulary():
    """The float32 sum does not drift."""
    V = 151936
    rows = dict(seed=jnp.zeros(1, jnp.uint32), position=jnp.zeros(1, jnp.int32), temperature=jnp.zeros(1))
    sample = sample_logits(jnp.full((1, V), 0.1), **rows, confidence=True)
    np.testing.assert_allclose(sample.confidence, [1 / V], rtol=1e-6)
