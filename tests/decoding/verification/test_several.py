"""Several i.i.d. chains verified together keep the target's distribution, and accept more than one chain does."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specformer_jax.decoding.verification.block import judge_block
from specformer_jax.decoding.verification.several import judge_several, verify_several
from tests.decoding.verification import trees

SIZES = [(2, 1, 2), (2, 1, 3), (2, 2, 2), (2, 2, 3), (2, 3, 2), (3, 1, 3), (3, 2, 2)]  # V, k, n
DRAWN = [(2, 3, 3), (3, 2, 2), (3, 3, 4)]
DRAWS = 1_000_000
P_VALUE = 1e-3 / len(DRAWN)
judge_all = jax.jit(jax.vmap(judge_several, (0, 0, 0, None, 0)))


class Ending:
    """What can become of n chains, chain by chain, in float64 by the formulas: (mass, u's that lead there, end)."""

    def __init__(self, tree: trees.Tree, chains):
        self.tree, self.chains, self.k = tree, chains, tree.depth
        self.found: list[tuple[float, np.ndarray, int, np.ndarray, int]] = []
        root = tree.target[0]
        self._go_on(0, 1.0, np.full((len(chains), self.k), 2.0), 0, np.asarray(root, float), 0)

    def _go_on(self, c, mass, uniforms, accepted, rest, owner):
        if mass == 0:
            return
        if c == len(self.chains):
            self.found.append((mass, uniforms, accepted, rest, owner))
            return
        chain = self.chains[c]
        if accepted == self.k or chain[:accepted] != self.chains[owner][:accepted]:
            self._go_on(c + 1, mass, uniforms, accepted, rest, owner)
            return
        draft, target = ([t[chain[:d]] for d, t in enumerate(tables)] for tables in (self.tree.draft, self.tree.target))
        target[accepted] = rest
        weight, left, chance = 1.0, {}, {}
        for d in range(accepted, self.k + 1):
            if d > accepted:
                weight = min(weight * target[d - 1][chain[d - 1]] / draft[d - 1][chain[d - 1]], 1.0)
            left[d] = target[d] if d == self.k else np.maximum(weight * target[d] - draft[d], 0)
            excess = left[d].sum()
            chance[d] = weight if d == self.k else excess / (excess + 1 - weight) if excess + 1 - weight > 0 else 1.0
        chance[accepted] = 1.0
        for end in range(accepted, self.k + 1):
            here = mass * chance[end] * np.prod([1 - chance[d] for d in range(end + 1, self.k + 1)])
            if here > 1e-12:
                u = uniforms.copy()
                u[c, end - 1 : end] = 0.0
                self._go_on(c + 1, here, u, end, left[end] / left[end].sum(), c)


def outcomes(tree: trees.Tree, n: int) -> tuple[trees.Law, float]:
    """The law of k + 1 tokens as `judge_several` commits them, and how many drafts it accepts in the mean."""
    rows = []
    for chains in itertools.product(list(tree.chains()), repeat=n):
        drafted = float(np.prod([tree.drafted(chain) for chain in chains]))
        if drafted > 0:
            rows += [(drafted * mass, chains, *rest) for mass, *rest in Ending(tree, chains).found]
    draft, target = (
        np.stack([np.stack([tree.along(chain)[which] for chain in row[1]]) for row in rows]) for which in (0, 1)
    )
    tokens, uniforms = np.array([r[1] for r in rows], np.int32), np.array([r[2] for r in rows], np.float32)
    accepted, rest, owner = map(np.asarray, judge_all(draft, target, tokens, tree.depth, uniforms))
    assert accepted.tolist() == [r[3] for r in rows]
    law: trees.Law = {}
    for i, row in enumerate(rows):
        committed = tuple(tokens[i, owner[i], : accepted[i]].tolist())
        assert committed == row[1][row[5]][: row[3]]
        for token in range(tree.vocabulary):
            tree.complete(law, (*committed, token), row[0] * float(rest[i, token]))
    return law, float(sum(row[0] * row[3] for row in rows))


@pytest.mark.parametrize(("vocabulary", "depth", "n"), SIZES)
def test_the_distribution_is_the_targets(vocabulary, depth, n):
    tree = trees.make(np.random.default_rng(vocabulary * 100 + depth * 10 + n), vocabulary, depth, apart=0.8)
    law, mean = outcomes(tree, n)
    assert trees.differ(law, tree.law()) < 5e-6
    assert mean <= bound(tree, n) + 1e-6


def bound(tree: trees.Tree, n: int) -> float:
    """No rule accepts more: a block is committed no oftener than it is said, or is among the drafts."""
    blocks = [b for d in range(1, tree.depth + 1) for b in itertools.product(range(tree.vocabulary), repeat=d)]
    return sum(min(tree.wanted(block), 1 - (1 - tree.drafted(block)) ** n) for block in blocks)


def test_more_chains_accept_more():
    tree = trees.make(np.random.default_rng(5), 2, 2)
    means = [outcomes(tree, n)[1] for n in (1, 2, 3)]
    assert means[0] + 0.01 < means[1] < means[2]


def test_one_chain_is_block_verification():
    tree = trees.make(np.random.default_rng(6), 3, 3)
    rng = np.random.default_rng(0)
    for chain in list(tree.chains())[::5]:
        draft, target = map(jnp.asarray, tree.along(chain))
        tokens, uniforms = jnp.array(chain), jnp.asarray(rng.random(3), jnp.float32)
        several = jax.jit(judge_several)(draft[None], target[None], tokens[None], 3, uniforms[None])
        alone = jax.jit(judge_block)(draft, target, tokens, 3, uniforms)
        assert several[0] == alone[0] and several[2] == 0
        np.testing.assert_array_equal(several[1], alone[1])


@pytest.mark.parametrize(("vocabulary", "depth", "n"), DRAWN)
def test_a_million_draws_are_the_targets(vocabulary, depth, n):
    tree = trees.make(np.random.default_rng(8), vocabulary, depth, apart=0.7)
    rng = np.random.default_rng(2)
    begin = np.array(list(tree.chains()), np.int32)
    draft, target = (np.stack(rows) for rows in zip(*(tree.along(tuple(c)) for c in begin), strict=True))
    which = rng.choice(len(begin), (DRAWS, n), p=[tree.drafted(tuple(chain)) for chain in begin])

    @jax.jit
    @jax.vmap
    def verify(which, uniforms, noise):
        return verify_several(*(jnp.asarray(x)[which] for x in (draft, target, begin)), depth, uniforms, noise)

    uniforms = rng.random((DRAWS, n, depth), np.float32)
    noise = rng.gumbel(size=(DRAWS, vocabulary)).astype(np.float32)
    found = jax.tree.map(np.asarray, verify(which, uniforms, noise))
    owners = begin[np.take_along_axis(which, found.chain[:, None], axis=1)[:, 0]]
    counts = trees.count(tree, rng, owners, found.accepted, found.token)
    assert trees.p_value(counts, np.array(list(tree.law().values()))) > P_VALUE
