"""Ragged attention by the native body of a CPU: right, row-invariant, in place, and for decoding alone."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu, lowering_for
from pallas_kernels.attention.cpu import ragged
from pallas_kernels.attention.places import Places
from tests.kernels.native.check_ragged import BATCHES, Case, bits

if reason := cpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
ROOT = Path(__file__).parents[3]


def run(*arguments: str, **variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def inputs(tokens=4, group=3, dtype=jnp.bfloat16, pages=8):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    q, k, v = draw(tokens, 2 * group, 16), draw(tokens, 2, 16), draw(tokens, 2, 16)
    cache = draw(pages, 2, 16, 16), draw(pages, 2, 16, 16)
    places = Places(jnp.zeros(tokens, jnp.int32), jnp.arange(20, 20 + tokens, dtype=jnp.int32), jnp.array([[5, 2, 3]]))
    return q, k, v, cache, places


@pytest.mark.parametrize("isa", cpu.isas())
def test_every_instruction_set_agrees_with_float64_and_is_row_invariant(isa):
    out = run("-m", "tests.kernels.native.check_ragged", SPECFORMER_CPU_ISA=isa, SPECFORMER_THREADS="3")
    assert int(out) > 1_000_000


def test_any_number_of_threads_gives_the_same_bits():
    program = """
import hashlib
from tests.kernels.native.check_ragged import BATCHES, Case

found = hashlib.sha256()
for batch in BATCHES:
    for group in (1, 3):
        for array in Case(batch, group=group).run():
            found.update(array.tobytes())
print(found.hexdigest())
"""
    assert len({run("-c", program, SPECFORMER_THREADS=threads) for threads in ("1", "2", "5")}) == 1


def copied(compiled, shape) -> list[str]:
    """The operations of a compiled program that copy an array of this shape."""
    dimensions = ",".join(map(str, shape))
    return re.findall(rf"\S+ = \w+\[{dimensions}\]\S* copy\S*\(.*", compiled.as_text())


def test_donated_pages_are_written_in_place():
    q, k, v, pages, places = inputs()

    @functools.partial(jax.jit, donate_argnums=3)
    def layers(q, k, v, pages, places):
        out = []
        for layer in pages:
            q, layer = ragged(q, k, v, layer, places)
            out.append(layer)
        return q, out

    cache = [jax.tree.map(jnp.copy, pages) for _ in range(3)]
    compiled = layers.lower(q, k, v, cache, places).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == 6 * pages[0].nbytes
    assert not copied(compiled, pages[0].shape)
    where = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]
    _, written = layers(q, k, v, cache, places)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(written)] == where


def test_a_loop_carries_the_pages_in_place_and_a_caller_keeps_its_own():
    q, k, v, pages, places = inputs(tokens=1)
    before = [np.array(x) for x in pages]

    def decode(q, pages):
        def step(carry):
            i, q, pages = carry
            out, pages = ragged(q, k, v, pages, dataclasses.replace(places, position=places.position + i))
            return i + 1, out, pages

        return jax.lax.while_loop(lambda carry: carry[0] < 20, step, (0, q, pages))

    compiled = jax.jit(decode).lower(q, pages).compile()
    assert len(copied(compiled, pages[0].shape)) <= 2  # on entry, for the caller's sake
    _, looped, _ = jax.jit(decode)(q, pages)
    assert all((bits(np.array(x)) == bits(y)).all() for x, y in zip(pages, before, strict=True))
    expected = q
    for i in range(20):
        moved = dataclasses.replace(places, position=places.position + i)
        expected, pages = ragged(expected, k, v, pages, moved)
    assert (looped == expected).all()


def test_rows_may_share_pages_that_neither_writes():
    case = Case(((48, 2), (48, 2)), page=16)
    for i in (1, 2):
        case.histories[1][i][:48] = case.histories[0][i][:48]
    case.lay(0)
    apart = case.run()[0]
    case.table[1, :3] = case.table[0, :3]
    assert (bits(case.run()[0]) == bits(apart)).all()


def test_a_row_follows_on_itself_call_by_call():
    """A prompt in chunks and then token by token: the bits of one call with all tokens."""
    whole = Case(((0, 90),), empty=0)
    expected, expected_keys, expected_values = whole.run()
    q, k, v, row, position = map(jnp.asarray, whole.tokens())
    pages = jnp.array(whole.keys), jnp.array(whole.values)
    outs = []
    for begin, end in ((0, 64), (64, 80), *((i, i + 1) for i in range(80, 90))):
        places = Places(row[begin:end], position[begin:end], jnp.asarray(whole.table))
        out, pages = ragged(q[begin:end], k[begin:end], v[begin:end], pages, places)
        outs.append(np.asarray(out))
    assert (bits(np.concatenate(outs)) == bits(expected)).all()
    assert (bits(np.array(pages[0])) == bits(expected_keys)).all()
    assert (bits(np.array(pages[1])) == bits(expected_values)).all()


def test_vmap_is_a_loop():
    q, k, v, pages, places = inputs()
    twice = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), (q, k, v, pages))
    together = jax.vmap(lambda q, k, v, pages: ragged(q, k, v, pages, places))(*twice)
    for i in range(2):
        alone = ragged(*jax.tree.map(lambda x: x[i], twice), places)  # noqa: B023
        assert jax.tree.all(jax.tree.map(lambda x, y: (x[i] == y).all(), together, alone))  # noqa: B023


def test_a_gradient_and_other_types_are_refused():
    q, k, v, pages, places = inputs(dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="for decoding and has no gradient"):
        jax.grad(lambda q: ragged(q, k, v, pages, places)[0].sum())(q)
    with pytest.raises(NotImplementedError, match="bfloat16 or float32 alone, not bfloat16 and float32"):
        ragged(q.astype(jnp.bfloat16), k, v, pages, places)
    with pytest.raises(NotImplementedError, match="bfloat16 or float32 alone, not float16"):
        ragged(*jax.tree.map(lambda x: x.astype(jnp.float16), (q, k, v, pages)), places)
    with lowering_for("cpu", native=False), pytest.raises(NotImplementedError, match="ruled out"):
        ragged(q, k, v, pages, places)
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
        jax.block_until_ready(ragged(q[:, :5], k, v, pages, places))


def test_a_batch_of_nobody_and_an_empty_one():
    q, k, v, pages, places = inputs()
    nobody = dataclasses.replace(places, row=places.row + 100, position=places.position - 1000)
    out, after = ragged(q, k, v, pages, nobody)
    assert (out == 0).all() and jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), after, pages))
    none = jax.tree.map(lambda x: x[:0], (q, k, v, places.row, places.position))
    out, after = ragged(*none[:3], pages, Places(*none[3:], places.table))
    assert out.shape == (0, 6, 16) and (after[0] == pages[0]).all()


def test_pages_that_a_table_names_wrongly_are_not_touched():
    """What a row's end leaves in its table may be any number."""
    q, k, v, pages, places = inputs()
    for number in (-1, 8, 2**31 - 1):
        out, after = ragged(q, k, v, pages, dataclasses.replace(places, table=jnp.array([[5, number, 3]], jnp.int32)))
        assert out.shape == q.shape and jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), after, pages))


@pytest.mark.parametrize("batch", BATCHES[1:3])
def test_many_callers_at_once(batch):
    case = Case(batch)
    expected = case.run()[0]
    with ThreadPoolExecutor(8) as callers:
        assert all(callers.map(lambda _: (bits(case.run()[0]) == bits(expected)).all(), range(16)))
