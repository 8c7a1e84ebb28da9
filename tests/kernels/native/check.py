"""What every instruction set's products must do; `test_products.py` runs this once for each, in its own process."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import matmul, pack, pack_four_bits, unpack
from pallas_kernels.product import four_bits
from pallas_kernels.product.api import matmul_rows

ROWS = (1, 2, 3, 4, 5, 7, 12, 31, 130)
BLOCKED = ((1, 7), (3, 100), (18, 320))  # blocks of inputs, columns
SIZES = ((1, 1), (3, 17), (16, 48), (33, 50), (64, 50), (65, 100), (96, 7), (576, 320), (1537, 96))


def check_all() -> int:
    """Checks both products and returns how many elements it looked at."""
    rng = np.random.default_rng(0)
    return sum(check(rng, inputs, columns) for inputs, columns in SIZES)


def check(rng: np.random.Generator, inputs: int, columns: int) -> int:
    weights = rng.normal(size=(inputs, columns)).astype(jnp.bfloat16)
    x = rng.normal(size=(max(ROWS), inputs)).astype(jnp.bfloat16)
    exact = x.astype(np.float64) @ weights.astype(np.float64)
    # Each term and each addition is off by one rounding at most.
    error = 2.0**-23 * (inputs + 2) * (np.abs(x.astype(np.float64)) @ np.abs(weights.astype(np.float64)))
    seen = 0
    for product, operand, rounding in (
        (jax.jit(matmul), pack(weights), 2.0**-8),
        (jax.jit(matmul_rows), jnp.asarray(np.ascontiguousarray(weights.T)), 0),
    ):
        before = None
        for rows in ROWS:
            got = np.asarray(product(jnp.asarray(x[:rows]), operand))
            allowed = error[:rows] + rounding * np.abs(exact[:rows])
            assert (np.abs(got.astype(np.float64) - exact[:rows]) <= allowed).all(), (inputs, columns, rows)
            if before is not None:  # bit for bit what the same rows gave among fewer others
                assert (bits(got)[: len(before)] == bits(before)).all(), (inputs, columns, rows)
            before = got
            seen += got.size
        # And anywhere among them.
        assert (bits(np.asarray(product(jnp.asarray(x[7:14]), operand))) == bits(before)[7:14]).all()
    return seen


def check_four_bits() -> None:
    """Whatever the rows, products by weights in four bits are those by the bfloat16 weights that they stand for."""
    rng = np.random.default_rng(1)
    for count, columns in BLOCKED:
        kernel = pack_four_bits(random_blocks(rng, count, columns))
        plain, product = pack(np.asarray(unpack(kernel))), jax.jit(matmul)
        for rows in (1, 2, 4, 5, 6, 7, 8, 11, 12, 13, 16, 17, 40):
            x = jnp.asarray(rng.normal(size=(rows, kernel.shape[0])), jnp.bfloat16)
            got, expected = np.asarray(product(x, kernel)), np.asarray(product(x, plain))
            assert np.abs(expected.astype(np.float32)).max() > 0
            assert (bits(got) == bits(expected)).all(), (rows, kernel.shape)


def random_blocks(rng: np.random.Generator, count: int, columns: int) -> np.ndarray:
    """Blocks of any finite float16: zeros, both signs, numbers too small for a full one, large ones."""
    blocks = np.empty((count, columns), four_bits.BLOCK)
    for name in ("scale", "least"):
        halves = rng.integers(0, 2**16, blocks.shape).astype(np.uint16)
        halves[rng.random(blocks.shape) < 0.2] &= 0x83FF
        halves[rng.random(blocks.shape) < 0.1] &= 0x8000
        halves[halves & 0x7C00 == 0x7C00] ^= 0x4000
        blocks[name] = halves.view(np.float16)
    blocks["q"] = rng.integers(0, 256, (*blocks.shape, 16))
    return blocks


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint8)


def check_special() -> None:
    """Infinities and NaN come out where they belong and nowhere else; rounding is to the nearest, ties to even."""
    weights = np.eye(16, dtype=np.float32).astype(jnp.bfloat16)
    x = np.zeros((3, 16), np.float32)
    x[0, 0], x[1] = np.nan, np.arange(16)
    got = np.asarray(jax.jit(matmul)(jnp.asarray(x, jnp.bfloat16), pack(weights))).astype(np.float32)
    assert np.isnan(got[0]).all()
    assert (got[1] == np.arange(16)).all() and (got[2] == 0).all()
    halves = np.array([[1.0], [2.0**-8]], np.float32).astype(jnp.bfloat16)  # 1 + 2^-8 lies between two bfloat16
    for first, expected in ((1.0, 1.0), (1.0 + 2.0**-7, 1.0 + 2.0**-6)):
        got = jax.jit(matmul)(jnp.array([[first, 1.0]], jnp.bfloat16), pack(halves))
        assert float(got[0, 0]) == expected


if __name__ == "__main__":
    check_special()
    check_four_bits()
    print(check_all())
