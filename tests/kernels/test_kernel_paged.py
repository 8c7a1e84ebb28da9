"""Attention over a paged cache, the reference and the kernel bodies (interpreted), against float64 numpy."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import Places, dispatch, lowering_for, mixed_mask_attention, ragged_attention, tuning
from pallas_kernels.attention.ragged import cut_into_tiles
from tests.kernels.kernel_inputs import (
    ATTENTION_SIZES,
    attention_case,
    dense_attention,
    dense_ragged,
    drawn,
    flat_case,
    in_pages,
)

SMALL = tuning.AttentionBlocks(rows=24, positions=16)  # several tiles of each kind even in a small case
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}
BODIES = ("xla", "tpu", "cuda")
EDGES = [-1, 0, 11, 12, 13, 15, 16, 44]  # an empty row, one that begins, page edges, a full one
ROWS = [(20, 1), (0, 2), (15, 3), (31, 4), (16, 5), (3, 6), (9, 7), (30, 8), (39, 9), (0, 23), (7, 0)]


@contextlib.contextmanager
def _running(body, size=SMALL):
    """The reference, or the interpreted kernel body of a platform; gives the implementation's name."""
    if body == "xla":
        yield "xla"
    else:
        with lowering_for(body, interpret=True), tuning.using(size):
            yield "pallas"


def _over_pages(case, body, p, *, size=SMALL, copies=(), **static):
    """The paged form on what a contiguous case holds, NaN wherever nothing may be read."""
    q, context, draft = case.dirty
    start = case.keywords["start"]
    end = np.where(start < 0, 0, start + q.shape[1])
    pages, table = in_pages(0, context, end, p, copies=copies)
    with _running(body, size) as implementation:
        attend = functools.partial(mixed_mask_attention, implementation=implementation, **static)
        return jax.jit(lambda q, c, d, s, t: attend(q, c, d, start=s, table=t))(q, pages, draft, start, table)


def _close(actual, expected, tolerance=1e-5):
    actual = np.asarray(actual, np.float32)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("J", [None, 3])
def test_pages_in_any_order(J, body):
    case = attention_case(1, B=8, C=48, J=J, start=EDGES)
    _close(_over_pages(case, body, 16), dense_attention(*case.clean, **case.keywords))


@pytest.mark.parametrize("body", BODIES)
def test_rows_share_pages(body):
    case = attention_case(2, B=3, C=64, start=[40, 33, 60])

    def share(operands):
        q, context, _ = operands
        return q, tuple(x.at[1:, :, :32].set(x[0, :, :32]) for x in context), None

    case = case._replace(clean=share(case.clean), dirty=share(case.dirty))
    copies = [(b, page) for b in (1, 2) for page in (0, 1)]
    _close(_over_pages(case, body, 16, copies=copies), dense_attention(*case.clean, **case.keywords))


@pytest.mark.parametrize(("body", "p", "positions"), [("tpu", 16, 48), ("cuda", 64, 16)])
def test_a_tile_of_several_pages_or_of_a_part(body, p, positions):
    case = attention_case(3, B=6, C=128, start=[-1, 0, 60, 63, 64, 124])
    out = _over_pages(case, body, p, size=tuning.AttentionBlocks(rows=24, positions=positions))
    _close(out, dense_attention(*case.clean, **case.keywords))


def test_a_causal_draft_block_over_pages():
    case = attention_case(4, C=48, J=3)
    expected = dense_attention(*case.clean, **case.keywords, bidirectional=False)
    _close(_over_pages(case, "tpu", 16, bidirectional=False), expected)


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1), (8, 1)])  # query groups of 1, 3, 4, 8
@pytest.mark.parametrize("H", [16, 80])
def test_heads_and_dtypes(H, heads, dtype, body):
    case = attention_case(5, B=8, C=48, N=heads[0], K=heads[1], H=H, start=EDGES, dtype=dtype)
    _close(_over_pages(case, body, 16), dense_attention(*case.clean, **case.keywords), TOLERANCE[dtype])


_SHAPES = dict(
    **ATTENTION_SIZES,
    p=st.sampled_from([16, 32]),
    tables=st.integers(1, 4),
    positions=st.sampled_from([16, 32, 64]),
    body=st.sampled_from(BODIES),
)


def _any_shape(seed, T, J, group, K, p, tables, positions, body):
    case = attention_case(seed, B=3, T=T, C=tables * p, N=group * K, K=K, H=8, J=J)
    size = tuning.AttentionBlocks(rows=24, positions=positions)
    _close(_over_pages(case, body, p, size=size), dense_attention(*case.clean, **case.keywords))


@given(**_SHAPES)
@drawn(4)
def test_any_pages(**shape):
    _any_shape(**shape)


@pytest.mark.slow
@given(**_SHAPES)
@drawn(30)
def test_any_pages_at_length(**shape):
    _any_shape(**shape)


def test_no_race_where_pages_are_read():
    """Mosaic's own simulator, as in `test_no_race_in_simulated_tpu_memory`."""
    case = attention_case(6, B=4, C=48, J=2, start=[-1, 0, 15, 40])
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    q, context, draft = case.dirty
    start = case.keywords["start"]
    pages, table = in_pages(0, context, np.where(start < 0, 0, start + 4), 16)
    two_pages = tuning.AttentionBlocks(rows=24, positions=32)
    with lowering_for("tpu"), tuning.using(two_pages), pltpu.force_tpu_interpret_mode(params):
        attend = functools.partial(mixed_mask_attention, implementation="pallas")
        out = jax.block_until_ready(attend(q, pages, draft, start=start, table=table))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    assert not simulator.races.races_found
    _close(out, dense_attention(*case.clean, **case.keywords))


@pytest.mark.parametrize("operand", [0, 1])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_pages_have_no_gradient(implementation, operand):
    q, pages, start = jnp.ones((1, 2, 2, 8)), (jnp.ones((1, 2, 16, 8)),) * 2, jnp.zeros(1, jnp.int32)
    attend = functools.partial(mixed_mask_attention, start=start, table=start[:, None], implementation=implementation)
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda *operands: attend(*operands).sum(), argnums=operand)(q, pages)


@pytest.mark.parametrize("p", [8, 24])
def test_pages_that_no_kernel_takes(p):
    flat = flat_case(0, [(3, 2)], p=p)
    with pytest.raises(NotImplementedError, match=f"pages hold {p} positions"):
        ragged_attention(*flat, tile=2, implementation="pallas")
    _check_flat(flat, "xla", 2)


def _check_flat(flat, body, tile, tolerance=1e-5, window=None):
    """Outputs and pages are those of float64; a page that is not written keeps its bits, NaN too."""
    places = flat.places if window is None else flat.places.windowed(window, flat.pages[0].shape[2])
    with _running(body) as implementation:
        attend = jax.jit(functools.partial(ragged_attention, tile=tile, implementation=implementation))
        out, pages = attend(*flat._replace(places=places))
    assert out.dtype == flat.q.dtype and pages[0].dtype == flat.pages[0].dtype
    expected, written = dense_ragged(*flat, window)
    _close(out, expected, tolerance)
    jax.tree.map(lambda a, e: np.testing.assert_array_equal(np.asarray(a, np.float64), e), pages, tuple(written))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(
    "tile", [1, 5, pytest.param(8, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)]
)
def test_windows_and_a_chunk(tile, body):
    _check_flat(flat_case(1, ROWS), body, tile)


@pytest.mark.parametrize("body", [pytest.param(body, marks=[pytest.mark.slow] * (body != "xla")) for body in BODIES])
def test_a_flat_batch_in_bfloat16(body):
    _check_flat(flat_case(2, ROWS, dtype=jnp.bfloat16), body, 4, tolerance=2e-2)


@pytest.mark.parametrize("body", BODIES)
def test_tokens_past_the_last_page(body):
    _check_flat(flat_case(3, [(46, 4), (48, 2), (2, 3)]), body, 4)


@pytest.mark.parametrize("body", BODIES)
def test_nan_is_written_as_zero(body):
    flat = flat_case(4, [(5, 3), (0, 2)], nobody=0)
    flat = flat._replace(k=flat.k.at[1].set(jnp.nan), v=flat.v.at[2, 0].set(jnp.nan))
    _check_flat(flat, body, 3)


def test_nobody_is_there():
    _check_flat(flat_case(5, [(7, 0)], nobody=4), "xla", 2)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("window", [1, 18])
def test_rows_that_begin_with_a_window(window, body):
    _check_flat(flat_case(7, ROWS), body, 5, window=window)


@pytest.mark.parametrize("window", [1, 16, 17])
def test_a_window_needs_short_tables(window):
    """Where it is known how many tokens a row has, its table has no more pages than they and the window can touch."""
    flat = flat_case(8, [(90, 4), (15, 3), (95, 1), (47, 4)], tables=6)
    flat = flat._replace(places=dataclasses.replace(flat.places, longest=4))
    assert flat.places.windowed(window, 16).table.shape == (4, 2 if window == 1 else 3)
    _check_flat(flat, "xla", 4, window=window)


def _any_flat_batch(seed, rows, tile, tables, group, K, nobody, window, known, body):
    rows = [(start % (tables * 16), tokens) for start, tokens in rows]
    flat = flat_case(seed, rows, tables=tables, N=group * K, K=K, H=8, nobody=nobody)
    longest = max(tokens for _, tokens in rows) if known else None
    flat = flat._replace(places=dataclasses.replace(flat.places, longest=longest))
    _check_flat(flat, body, tile, window=window)


_BATCHES = dict(
    seed=st.integers(0, 2**31),
    rows=st.lists(st.tuples(st.integers(0, 63), st.integers(0, 20)), min_size=1, max_size=5).filter(
        lambda rows: sum(tokens for _, tokens in rows)
    ),
    tile=st.integers(1, 12),
    tables=st.integers(1, 4),
    group=st.sampled_from([1, 3, 4, 8]),
    K=st.integers(1, 2),
    nobody=st.integers(0, 5),
    window=st.none() | st.integers(1, 70),
    known=st.booleans(),
)


@given(**_BATCHES)
@drawn(4)
def test_any_flat_batch(**batch):
    _any_flat_batch(**batch, body="xla")


@pytest.mark.slow
@given(**_BATCHES, body=st.sampled_from(["tpu", "cuda"]))
@drawn(30)
def test_any_flat_batch_at_length(**batch):
    _any_flat_batch(**batch)


def test_pages_are_written_in_place():
    flat = flat_case(6, ROWS)
    attend = jax.jit(functools.partial(ragged_attention, tile=4, implementation="xla"), donate_argnums=3)
    compiled = attend.lower(*flat).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(x.nbytes for x in flat.pages)
    shape = ",".join(map(str, flat.pages[0].shape))
    assert f" copy(f32[{shape}]" not in compiled.as_text()


def test_the_drawing_of_a_flat_batch():
    """The docstring of `ragged_attention` is what is cut."""
    lines = [line.split() for line in ragged_attention.__doc__.splitlines()]
    drawn = {
        line[0]: line[1:]
        for line in lines
        if line and line[0] in ("token", "row", "position", "tile") and len(line) == 12
    }
    number = lambda name: jnp.array([-1 if x == "." else int(x) for x in drawn[name]], jnp.int32)
    places = Places(number("row"), number("position"), jnp.zeros((3, 1), jnp.int32))
    cut = cut_into_tiles(places, 3)
    mine = np.asarray(places.position) >= 0
    np.testing.assert_array_equal(np.where(mine, cut.tile, -1), number("tile"))
    leads = [drawn["tile"].index(str(tile)) for tile in range(5)]
    np.testing.assert_array_equal(cut.first, [*leads, len(mine)])  # 3 rows and 11 // 3 tiles at most
    np.testing.assert_array_equal(number("token"), np.arange(len(mine)))


@pytest.mark.skipif(dispatch.native_unavailable() is not None, reason="no native bodies were built")
def test_a_cpu_takes_the_native_body(monkeypatch):
    calls = []
    body = lambda *operands: calls.append(operands) or (operands[0], operands[3])
    monkeypatch.setattr("pallas_kernels.attention.cpu.ragged", body)
    flat = flat_case(7, [(3, 2)])
    out, pages = ragged_attention(*flat, tile=2)
    assert out is flat.q and pages is flat.pages
    assert all(got is given for got, given in zip(calls[0], flat, strict=True))
    mixed = flat._replace(q=flat.q.astype(jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="not bfloat16 and float32"):
        ragged_attention(*mixed, tile=2, implementation="native")
    with pytest.raises(NotImplementedError, match="different dtypes"):
        ragged_attention(*mixed, tile=2, implementation="pallas")
    assert ragged_attention(*mixed, tile=2)[0].dtype == jnp.bfloat16
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=jnp.zeros((3, 4, 6, 8))), "q must be"),
        (dict(k=jnp.zeros((3, 2, 4))), "k and v must be"),
        (dict(q=jnp.zeros((3, 5, 8))), "cannot be grouped"),
        (dict(pages=(jnp.zeros((9, 2, 16, 4)),) * 2), "pages must be"),
        (
            dict(places=Places(jnp.zeros(3, jnp.int32), jnp.zeros(4, jnp.int32), jnp.zeros((2, 1), jnp.int32))),
            "row and position",
        ),
        (
            dict(places=Places(jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.int32), jnp.zeros(2, jnp.int32))),
            "table must be",
        ),
        (dict(tile=0), "a tile must"),
    ],
)
def test_shapes_that_do_not_fit(unchecked_shapes, change, message):
    numbers = jnp.zeros(3, jnp.int32)
    arguments = dict(
        q=jnp.zeros((3, 6, 8)),
        k=jnp.zeros((3, 2, 8)),
        v=jnp.zeros((3, 2, 8)),
        pages=(jnp.zeros((9, 2, 16, 8)),) * 2,
        places=Places(numbers, numbers, jnp.zeros((2, 1), jnp.int32)),
        tile=2,
    )
    with pytest.raises(ValueError, match=message):
        ragged_attention(**(arguments | change))
