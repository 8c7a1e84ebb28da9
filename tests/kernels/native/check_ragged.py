"""What every instruction set's ragged attention must do; `test_ragged.py` runs this for each, in its own process."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.cpu import ragged
from pallas_kernels.attention.places import Places

SIZES = (8, 64, 80, 96, 128)
GROUPS = tuple(range(1, 9))
BATCHES = (  # rows as (first position, tokens), in the order in which they lie in the batch
    ((0, 1),),
    ((99, 1),),
    ((126, 5),),
    ((0, 130),),
    ((61, 5), (0, 3), (200, 1), (63, 2), (17, 40)),
)

attend = jax.jit(ragged)


class Case:
    """A cache of rows that have a history, and a batch of tokens that follow on it.

    Pages are taken in any order; all that no row has written is NaN.
    """

    def __init__(self, batch, *, group=3, kv_heads=2, size=64, page=16, dtype=jnp.bfloat16, seed=0, spare=2, empty=2):
        rng = np.random.default_rng(seed)
        draw = lambda *shape: rng.normal(size=shape).astype(dtype)
        ends = [first + tokens for first, tokens in batch]
        heads = group * kv_heads
        self.histories = [
            (draw(end, heads, size), draw(end, kv_heads, size), draw(end, kv_heads, size)) for end in ends
        ]
        self.batch, self.page, self.empty, self.seed = batch, page, empty, seed
        self.tables = max(-(-end // page) for end in ends) + spare
        self.lay(seed)

    def lay(self, seed):
        """Gives the rows their pages anew."""
        rng = np.random.default_rng(seed)
        _, k, _ = self.histories[0]
        taken = rng.permutation(len(self.batch) * self.tables + 3)[: len(self.batch) * self.tables]
        self.table = taken.reshape(len(self.batch), self.tables).astype(np.int32)
        shape = (self.table.size + 3, k.shape[1], self.page, k.shape[2])
        self.keys, self.values = np.full(shape, np.nan, k.dtype), np.full(shape, np.nan, k.dtype)
        for row, (first, _) in enumerate(self.batch):
            _, k, v = self.histories[row]
            for position in range(first):
                page, inside = self.table[row, position // self.page], position % self.page
                self.keys[page, :, inside], self.values[page, :, inside] = k[position], v[position]

    def tokens(self):
        """The batch's arrays; a few tokens that are nobody's follow on those of each row."""
        parts, rows, positions = [], [], []
        for row, (first, count) in enumerate(self.batch):
            parts.append([x[first : first + count] for x in self.histories[row]])
            parts.append([np.full((self.empty, *x.shape[1:]), np.nan, x.dtype) for x in self.histories[row]])
            rows += [row] * count + [7 * row - 3] * self.empty
            positions += [*range(first, first + count), *[-1 - row] * self.empty]
        q, k, v = (np.concatenate([part[i] for part in parts]) for i in range(3))
        return q, k, v, np.array(rows, np.int32), np.array(positions, np.int32)

    def run(self):
        q, k, v, row, position = self.tokens()
        places = Places(jnp.asarray(row), jnp.asarray(position), jnp.asarray(self.table))
        out, pages = attend(q, k, v, (jnp.array(self.keys), jnp.array(self.values)), places)
        return np.array(out), *map(np.array, pages)


def oracle(q, k, v, keys, values, row, position, table):
    """The same in float64, a token after another; also the sum of the values' magnitudes, by weight."""
    keys, values, page = keys.copy(), values.copy(), keys.shape[2]
    for t in np.flatnonzero((position >= 0) & (position < table.shape[1] * page)):
        place = table[row[t], position[t] // page], slice(None), position[t] % page
        keys[place] = np.where(np.isnan(k[t]), 0, k[t])
        values[place] = np.where(np.isnan(v[t]), 0, v[t])
    out = np.zeros(q.shape)
    sizes = np.zeros(q.shape)
    for t in np.flatnonzero(position >= 0):
        # [K, positions, H], and the queries of each KV head
        own_keys, own_values = (
            np.moveaxis(x[table[row[t]]], 1, 0).reshape(x.shape[1], -1, x.shape[3])[:, : position[t] + 1].astype(float)
            for x in (keys, values)
        )
        scores = q[t].astype(float).reshape(k.shape[1], -1, q.shape[2]) @ own_keys.swapaxes(1, 2) / np.sqrt(q.shape[2])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[t] = (weights @ own_values).reshape(q.shape[1:])
        sizes[t] = (weights @ np.abs(own_values)).reshape(q.shape[1:])
    return out, keys, values, sizes


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


def check(case: Case) -> int:
    q, k, v, row, position = case.tokens()
    out, keys, values, sizes = oracle(q, k, v, case.keys, case.values, row, position, case.table)
    got, got_keys, got_values = case.run()
    assert (bits(got_keys) == bits(keys)).all() and (bits(got_values) == bits(values)).all()
    assert (got[position < 0] == 0).all()
    # Scores are off by some roundings of their terms, and a weight by as much; then come those of the sum.
    rounding = 2.0**-8 if got.dtype == jnp.bfloat16 else 0
    assert (np.abs(got.astype(np.float64) - out) <= 3e-6 * sizes + rounding * np.abs(out)).all()
    return got.size


def check_all() -> int:
    """Checks shapes, types and pages against float64 and returns how many elements it looked at."""
    seen = 0
    for i, (size, batch) in enumerate(itertools.product(SIZES, BATCHES)):
        for j, dtype in enumerate((jnp.bfloat16, jnp.float32)):
            group, page = GROUPS[(i + 3 * j) % 8], (16, 64, 8, 48)[(i + j) % 4]
            seen += check(Case(batch, group=group, size=size, page=page, dtype=dtype, seed=i))
    for group in GROUPS:
        seen += check(Case(BATCHES[-1], group=group, kv_heads=3, size=64))
    for size in (1, 7, 33):  # heads that are no whole number of vectors
        seen += check(Case(BATCHES[-1], size=size)) + check(Case(BATCHES[-1], size=size, dtype=jnp.float32))
    return seen


def check_invariance() -> None:
    """A token's result is the same bits alone, in a window, in a chunk, among rows, in other pages of another size."""
    for dtype, size, group in ((jnp.bfloat16, 64, 3), (jnp.float32, 80, 1), (jnp.bfloat16, 20, 8)):
        make = functools.partial(Case, dtype=dtype, size=size, group=group)
        whole = make(((0, 140), (30, 3)))
        expected = whole.run()[0][:140]
        for first, count in ((139, 1), (130, 5), (60, 9), (63, 2), (64, 1), (0, 1), (5, 120)):
            for page, seed, rows in ((16, 1, 0), (64, 2, 3), (4, 3, 1), (48, 4, 0)):
                case = make((*((11 * i, 1 + i) for i in range(rows)), (first, count)), page=page)
                case.histories[rows] = tuple(x[: first + count] for x in whole.histories[0])
                case.lay(seed)
                *_, row, position = case.tokens()
                got = case.run()[0][(row == rows) & (position >= 0)]
                assert (bits(got) == bits(expected[first : first + count])).all(), (size, first, count, page)


def check_special() -> None:
    """NaN keys and values of a batch are zeros; what a token must not see leaves no trace, whatever it is."""
    for dtype in (jnp.bfloat16, jnp.float32):
        clean = Case(((3, 4), (70, 2)), dtype=dtype)
        dirty = Case(((3, 4), (70, 2)), dtype=dtype)
        for case, hole in ((clean, 0), (dirty, np.nan)):
            for history in case.histories:
                history[1][5, 0], history[2][5, 1] = hole, hole
        assert (bits(clean.run()[0]) == bits(dirty.run()[0])).all()
        assert np.isfinite(dirty.run()[0].astype(np.float32)).all()
        before = clean.run()[0]
        _, k, v = clean.histories[0]
        k[6], v[6] = np.inf, -np.inf  # the last of its row
        after = clean.run()[0]
        assert (bits(after)[:3] == bits(before)[:3]).all() and not np.isfinite(after[3].astype(np.float32)).any()
        assert (bits(after)[4:] == bits(before)[4:]).all()
        # A query that is no number is its own token's and head's misfortune alone.
        q = clean.histories[1][0]
        q[70, 1] = np.nan
        poisoned = clean.run()[0]
        assert np.isnan(poisoned[6, 1].astype(np.float32)).all()
        poisoned[6, 1] = after[6, 1]
        assert (bits(poisoned) == bits(after)).all()
        # Positions past the last page of a table are written nowhere.
        short = Case(((30, 4),), dtype=dtype, spare=-1)
        out, keys, values = short.run()
        _, expected_keys, expected_values, _ = oracle(
            *short.tokens()[:3], short.keys, short.values, *short.tokens()[3:], short.table
        )
        assert (bits(keys) == bits(expected_keys)).all() and (bits(values) == bits(expected_values)).all()
        assert np.isfinite(out.astype(np.float32)).all()


if __name__ == "__main__":
    check_special()
    check_invariance()
    print(check_all())
