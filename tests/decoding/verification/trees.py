"""Small vocabularies and short chains: drafter and target as tables over all prefixes, and laws summed exactly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import stats

Law = dict[tuple[int, ...], float]


class Tree(NamedTuple):
    """What drafter and target say after every prefix.

    Attributes:
      draft: depth -> f64[V, .., V, V]: the drafter's distribution after each prefix of that length, k of them.
      target: the same of the target, k + 1 of them.
    """

    draft: list[np.ndarray]
    target: list[np.ndarray]

    @property
    def vocabulary(self) -> int:
        return self.target[0].shape[-1]

    @property
    def depth(self) -> int:
        return len(self.draft)

    def chains(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(range(self.vocabulary), repeat=self.depth)

    def along(self, chain: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """f32[k, V] and f32[1 + k, V]: the distributions that a chain passes."""
        of = lambda tables: np.stack([table[chain[:d]] for d, table in enumerate(tables)]).astype(np.float32)
        return of(self.draft), of(self.target)

    def drafted(self, chain: tuple[int, ...]) -> float:
        """The chance that the drafter drafts it."""
        return float(np.prod([self.draft[d][chain[: d + 1]] for d in range(len(chain))]))

    def wanted(self, sequence: tuple[int, ...]) -> float:
        """The chance that plain decoding says it."""
        return float(np.prod([self.target[d][sequence[: d + 1]] for d in range(len(sequence))]))

    def law(self) -> Law:
        """Of the k + 1 tokens that plain decoding says."""
        return {s: self.wanted(s) for s in itertools.product(range(self.vocabulary), repeat=self.depth + 1)}

    def complete(self, law: Law, begin: tuple[int, ...], mass: float) -> None:
        """Adds a mass that goes on from its committed tokens by plain decoding, to k + 1 tokens."""
        for end in itertools.product(range(self.vocabulary), repeat=self.depth + 1 - len(begin)):
            whole = (*begin, *end)
            law[whole] = law.get(whole, 0.0) + mass * self.wanted(whole) / max(self.wanted(begin), 1e-300)


def make(rng: np.random.Generator, vocabulary: int, depth: int, *, apart: float = 1.0) -> Tree:
    """Random distributions with some zeros; the drafter's are near the target's for a small `apart`."""

    def table(d: int) -> np.ndarray:
        x = rng.dirichlet(np.full(vocabulary, 0.7), size=(vocabulary,) * d)
        x = np.where((rng.random(x.shape) < 0.15) & (x < x.max(axis=-1, keepdims=True)), 0, x)
        return x / x.sum(axis=-1, keepdims=True)

    target = [table(d) for d in range(depth + 1)]
    return Tree([(1 - apart) * target[d] + apart * table(d) for d in range(depth)], target)


def differ(law: Law, other: Law) -> float:
    """The largest difference of two laws."""
    return max(abs(law.get(s, 0.0) - other.get(s, 0.0)) for s in {*law, *other})


def count(tree: Tree, rng: np.random.Generator, chain: np.ndarray, accepted: np.ndarray, token: np.ndarray):
    """How often each sequence of `Tree.law` came: what was committed, and then plain decoding's."""
    V, code = tree.vocabulary, np.zeros(len(chain), int)
    for d, table in enumerate(tree.target):
        below = np.cumsum(table.reshape(-1, V), axis=1)[code]
        own = (rng.random((len(chain), 1)) > below[:, :-1]).sum(axis=1)
        drafted = chain[:, min(d, tree.depth - 1)]
        code = code * V + np.where(d < accepted, drafted, np.where(d == accepted, token, own))
    return np.bincount(code, minlength=V ** (tree.depth + 1))


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of the chi-square test that the counts are of draws from `expected`; what cannot be drawn must not be there."""
    assert counts[expected == 0].sum() == 0, "what the target never says was committed"
    possible = expected > 0
    expected = expected[possible] / expected.sum() * counts.sum()
    return float(stats.chisquare(counts[possible], expected).pvalue)
