"""What every instruction set's norm, rotation, gate and sampling must do; `test_rows.py` runs this in processes.

Prints how many elements were looked at and a digest of all results: every set and number of threads has the same.
"""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rms_norm, sample_hidden, sample_logits, split_and_rotate, swiglu
from pallas_kernels.noise import noise_bits, row_keys

ROWS = (1, 16, 400)
SIZES = (1, 15, 16, 17, 100, 577, 1536)
EPSILON = 1e-5

norm = jax.jit(functools.partial(rms_norm, epsilon=EPSILON, implementation="native"))
gate = jax.jit(functools.partial(swiglu, implementation="native"))
sampled = jax.jit(functools.partial(sample_logits, confidence=True, implementation="native"))
sampled_hidden = jax.jit(functools.partial(sample_hidden, confidence=True, implementation="native"))
rotate = jax.jit(functools.partial(split_and_rotate, implementation="native"))


class Results:
    """How many elements were looked at, and their digest."""

    def __init__(self):
        self.count, self.digest = 0, hashlib.sha256()

    def add(self, array: np.ndarray) -> None:
        self.count += array.size
        self.digest.update(array.tobytes())


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


def among_others(function, x: np.ndarray) -> np.ndarray:
    """The results of all rows, after a look at whether they are the same bits among fewer others."""
    whole = np.asarray(function(jnp.asarray(x)))
    for rows in ROWS:
        for first in {0, min(7, len(x) - rows)}:
            got = np.asarray(function(jnp.asarray(x[first : first + rows])))
            assert (bits(got) == bits(whole[first : first + rows])).all(), (x.shape, rows, first)
    return whole


def check_norm(results: Results) -> None:
    rng = np.random.default_rng(0)
    for size in SIZES:
        for dtype, error in ((jnp.bfloat16, 2.0**-7), (jnp.float32, (size / 16 + 12) * 2.0**-24)):
            x = (rng.normal(size=(max(ROWS), size)) * 10 ** rng.uniform(-2, 2, (max(ROWS), 1))).astype(dtype)
            scale = rng.normal(size=size).astype(dtype)
            got = among_others(lambda x, scale=jnp.asarray(scale): norm(x, scale), x)
            x, scale = x.astype(np.float64), scale.astype(np.float64)
            exact = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPSILON) * scale
            assert (np.abs(got.astype(np.float64) - exact) <= 1.01 * error * np.abs(exact)).all(), (size, dtype)
            results.add(got)


def check_gate(results: Results) -> None:
    rng = np.random.default_rng(1)
    gates = np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16)
    gates = gates[np.isfinite(gates.astype(np.float32))]
    for size in (255, 15, 16, 1):  # the first has every gate there is
        x = rng.normal(size=(max(ROWS), 2, size)).astype(jnp.bfloat16)
        flat = np.resize(gates, max(ROWS) * size) if size > 100 else rng.choice(gates, max(ROWS) * size)
        x[:, 0] = flat.reshape(-1, size)
        got = among_others(gate, x)
        results.add(got)
        x = x.astype(np.float64)
        with np.errstate(over="ignore"):
            exact = x[:, 0] / (1 + np.exp(-x[:, 0])) * x[:, 1]
        # Five roundings; and a factor that is too small for a float32 counts as 0.
        allowed = 5.1 * 2.0**-8 * np.abs(exact) + 2.0**-125 * (1 + np.abs(x[:, 0])) * (1 + np.abs(x[:, 1]))
        allowed[np.abs(exact) > 3e38] = np.inf
        assert (np.abs(got.astype(np.float64) - exact) <= allowed).all(), size


def check_rotation(results: Results) -> None:
    rng = np.random.default_rng(3)
    for K, M, H in ((1, 3, 2), (3, 5, 64), (2, 4, 80), (1, 10, 34)):
        qkv = rng.normal(size=(max(ROWS), K, M, H)).astype(jnp.bfloat16)
        angles = rng.uniform(-100, 100, (max(ROWS), H // 2)).astype(np.float32)
        whole = [np.asarray(x) for x in rotate(qkv, np.cos(angles), np.sin(angles))]
        for rows in ROWS:
            part = slice(min(7, max(ROWS) - rows), min(7, max(ROWS) - rows) + rows)
            for got, all_rows in zip(rotate(qkv[part], np.cos(angles[part]), np.sin(angles[part])), whole, strict=True):
                assert (bits(np.asarray(got)) == bits(all_rows[part])).all(), (K, M, H, rows)
        cos, sin = (f(angles.astype(np.float64))[:, None, None] for f in (np.cos, np.sin))
        low, high = qkv[..., : H // 2].astype(np.float64), qkv[..., H // 2 :].astype(np.float64)
        exact = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
        q, k, v = whole
        exact_q, exact_k = exact[:, :, :-2].reshape(q.shape), exact[:, :, -2]
        assert (v == qkv[:, :, -1]).all()
        for got, right in ((q, exact_q), (k, exact_k)):
            assert (np.abs(got.astype(np.float64) - right) <= 1.01 * 2.0**-8 * np.abs(right) + 1e-5).all(), (K, M, H)
        for heads in whole:
            results.add(heads)


def check_sampling(results: Results) -> None:
    rng = np.random.default_rng(4)
    R = 40
    rows = dict(
        seed=rng.integers(0, 2**32, R).astype(np.uint32),
        position=rng.integers(0, 10**6, R).astype(np.int32),
        temperature=rng.choice([0.0, 0.5, 1.0, 1.7], R).astype(np.float32),
    )
    for columns in (1, 7, 16, 255, 256, 257, 5000):
        logits = (rng.normal(size=(R, columns)) * 4).astype(np.float32)
        logits[rng.random(logits.shape) < 0.1] = -np.inf
        threshold = np.where(rng.random(R) < 0.5, -np.inf, 0.0).astype(np.float32)
        keys = row_keys(jnp.asarray(rows["seed"])[:, None], jnp.asarray(rows["position"])[:, None])
        v = (np.asarray(noise_bits(keys, jnp.arange(columns))).astype(np.float64) + 0.5) / 2.0**32
        sampled_rows = rows["temperature"][:, None] > 0
        with np.errstate(divide="ignore"):
            noisy = logits / np.where(sampled_rows, rows["temperature"][:, None], 1.0) - np.log(-np.log1p(-v))
        noisy[(logits < threshold[:, None])] = -np.inf
        exact = np.where(sampled_rows, noisy, logits)
        whole = sampled(logits, **rows, threshold=threshold)
        token = np.asarray(whole.token)
        # The winner is within float32's rounding of the best.
        best = exact.max(axis=1)
        won = exact[np.arange(R), token]
        assert ((won >= best - 3e-6 * (1 + np.abs(best))) | (best == -np.inf)).all(), columns
        assert (token[best == -np.inf] == 0).all()
        for some in (slice(0, 1), slice(3, 12), slice(39, 40)):
            part = sampled(logits[some], **{name: x[some] for name, x in rows.items()}, threshold=threshold[some])
            assert (bits(np.asarray(part.token)) == bits(token[some])).all()
            assert (bits(np.asarray(part.confidence)) == bits(np.asarray(whole.confidence)[some])).all()
        results.add(token)
        results.add(np.asarray(whole.confidence))
        # Small integers: every product and sum is exact, so the fused form sees the very same logits.
        hidden, head = (rng.integers(-2, 3, shape).astype(jnp.bfloat16) for shape in ((R, 24), (columns, 24)))
        product = hidden.astype(np.float32) @ head.astype(np.float32).T
        for x, y in zip(sampled_hidden(hidden, head, **rows), sampled(product, **rows), strict=True):
            assert (bits(np.asarray(x)) == bits(np.asarray(y))).all(), columns
    logits = np.zeros((2, 600), np.float32)
    logits[1, 300] = np.nan
    token = np.asarray(sampled(logits, **{name: x[:2] * 0 for name, x in rows.items()}).token)
    assert token.tolist() == [0, 599], "one row's NaN is its own"


def check_special() -> None:
    """NaN and infinity are their own row's or element's misfortune alone."""
    for dtype in (jnp.bfloat16, jnp.float32):
        for size in (5, 33):
            x = np.random.default_rng(2).normal(size=(5, size)).astype(dtype)
            scale = jnp.ones(size, dtype)
            clean = np.asarray(norm(jnp.asarray(x), scale)).astype(np.float32)
            x[1, 2], x[2, 3], x[3] = np.nan, -np.inf, 0
            got = np.asarray(norm(jnp.asarray(x), scale)).astype(np.float32)
            assert np.isnan(got[1]).all() and (got[3] == 0).all()
            assert np.isnan(got[2, 3]) and (np.delete(got[2], 3) == 0).all()
            assert (got[[0, 4]] == clean[[0, 4]]).all()
            scale = scale.at[size - 1].set(jnp.nan)
            got = np.asarray(norm(jnp.asarray(x), scale)).astype(np.float32)
            assert np.isnan(got[:, -1]).all() and (got[[0, 4], :-1] == clean[[0, 4], :-1]).all()
    for size in (5, 33):
        x = np.ones((3, 2, size), jnp.bfloat16)
        x[1, 0, :4], x[2, 1, :2] = (np.nan, np.inf, -np.inf, -1e38), (np.nan, -np.inf)
        got = np.asarray(gate(jnp.asarray(x))).astype(np.float32)
        assert np.isnan(got[1, [0, 2]]).all() and got[1, 1] == np.inf and got[1, 3] == 0
        assert np.isnan(got[2, 0]) and got[2, 1] == -np.inf
        assert (got[0] == got[0, 0]).all() and (got[1, 4:] == got[0, 0]).all() and (got[2, 2:] == got[0, 0]).all()


if __name__ == "__main__":
    check_special()
    found = Results()
    check_norm(found)
    check_gate(found)
    check_rotation(found)
    check_sampling(found)
    print(found.count, found.digest.hexdigest())
