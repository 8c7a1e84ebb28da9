"""Mixed-mask attention: the reference against float64 numpy, the kernel bodies (interpreted) against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import lowering_for, may_attend, mixed_mask_attention, tuning
from tests.kernels.kernel_inputs import ATTENTION_SIZES, attention_case, dense_attention, drawn

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}
SMALL = tuning.AttentionBlocks(rows=24, positions=16)  # several tiles of each kind even in a small case
FORMS = {
    "decode": dict(),
    "packed": dict(T=20, packed=True),
    "draft": dict(J=3, context=False),
    "draft+context": dict(J=3),
    "packed draft": dict(T=12, J=2, packed=True, context=False),
    "packed draft+context": dict(T=12, J=2, packed=True),
}


@jax.jit
def _plain(operands, keywords):
    return mixed_mask_attention(*operands, **keywords, implementation="xla")


def _loss(implementation, **static):
    """(sum of a fixed projection of the output, output): a scalar that has a gradient everywhere."""

    def loss(operands, keywords):
        out = mixed_mask_attention(*operands, **keywords, **static, implementation=implementation)
        project = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out.astype(jnp.float32) * project), out

    return loss


def _without_dead_cache(case):
    """What the reference takes: NaN in padding and empty rows, but a finite cache (see its docstring)."""
    context = case.dirty[1] if "segments" in case.keywords else case.clean[1]
    return (case.dirty[0], context, case.dirty[2])


def _interpreted(platform):
    return lowering_for(platform, interpret=True)


def _check(case, *, platform="tpu", gradients=True, size=SMALL, tolerance=1e-5, **static):
    """The kernel on dirty operands equals the reference on clean ones, and so do its gradients."""

    def run(loss, operands):
        if not gradients:
            return jax.jit(loss)(operands, case.keywords)[1], ()
        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(operands, case.keywords)
        return out, grads

    expected = run(_loss("xla", **static), case.clean)
    with _interpreted(platform), tuning.using(size):
        actual = run(_loss("pallas", **static), case.dirty)
    leaves = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    assert leaves[0][0].dtype == case.clean[0].dtype
    for a, e in leaves:
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * max(1.0, np.abs(e).max()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_reference_is_attention_in_float64(form, bidirectional):
    case = attention_case(1, **FORMS[form])
    out = jax.jit(lambda o, k: mixed_mask_attention(*o, **k, bidirectional=bidirectional, implementation="xla"))(
        _without_dead_cache(case), case.keywords
    )
    expected = dense_attention(*case.clean, **case.keywords, bidirectional=bidirectional)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_reference_gradients_ignore_dead_positions(form):
    case = attention_case(2, **FORMS[form])
    grad = jax.jit(jax.grad(_loss("xla"), has_aux=True))
    clean, dirty = (grad(o, case.keywords)[0] for o in (case.clean, _without_dead_cache(case)))
    jax.tree.map(lambda c, d: np.testing.assert_allclose(d, c, rtol=1e-5, atol=1e-6), clean, dirty)


@pytest.mark.parametrize("form", FORMS)
def test_tpu_body(form):
    _check(attention_case(3, **FORMS[form]))


@pytest.mark.parametrize("form", ["decode", pytest.param("packed draft+context", marks=pytest.mark.slow)])
def test_gpu_body(form):
    _check(attention_case(4, **FORMS[form]), platform="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1), (8, 1)])  # query groups of 1, 3, 4, 8
def test_every_form(form, heads, dtype, platform):
    case = attention_case(5, N=heads[0], K=heads[1], dtype=dtype, **FORMS[form])
    _check(case, platform=platform, tolerance=TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("form", ["decode", "packed draft+context"])
@pytest.mark.parametrize("H", [64, 80, 128])
def test_head_sizes(form, H, platform):
    _check(attention_case(6, H=H, **FORMS[form]), platform=platform)


def test_bfloat16_and_head_size_80():
    case = attention_case(7, H=80, J=2, dtype=jnp.bfloat16)
    _check(case, tolerance=2e-2, gradients=False)


def test_causal_draft_block():
    _check(attention_case(8, J=3), bidirectional=False, gradients=False)


def test_lengths_at_tile_edges():
    case = attention_case(9, B=8, T=4, C=48, start=[-1, 0, 11, 12, 13, 15, 16, 44])  # empty, one, tile edges, full
    _check(case, gradients=False)


def test_nothing_to_attend_is_zero():
    case = attention_case(10, B=2, start=[-1, -1])
    with _interpreted("tpu"), tuning.using(SMALL):
        out = mixed_mask_attention(*case.dirty, **case.keywords, implementation="pallas")
    assert not np.asarray(out).any()
    assert not np.asarray(_plain(_without_dead_cache(case), case.keywords)).any()


def test_window_past_the_end_reads_what_is_there():
    case = attention_case(11, B=2, T=4, C=20, start=[18, 19])
    expected = dense_attention(*case.clean, **case.keywords)
    np.testing.assert_allclose(_plain(case.clean, case.keywords), expected, atol=1e-5)
    _check(case, gradients=False)


@pytest.mark.slow
@pytest.mark.parametrize("W", range(1, 10))
def test_every_window(W):
    _check(attention_case(20 + W, T=W, C=40), gradients=False)


@pytest.mark.slow
@pytest.mark.parametrize("J", range(1, 9))
def test_every_draft_length(J):
    _check(attention_case(30 + J, B=2, T=3, J=J))


_SHAPES = dict(
    **ATTENTION_SIZES,
    extra=st.integers(0, 40),
    context=st.booleans(),
    packed=st.booleans(),
    positions=st.sampled_from([8, 16, 32]),
)


def _property_body(seed, T, J, group, K, extra, context, packed, positions):
    context = context or J is None
    case = attention_case(seed, B=2, T=T, C=T + extra, N=group * K, K=K, H=8, J=J, context=context, packed=packed)
    _check(case, gradients=False, size=tuning.AttentionBlocks(rows=32, positions=positions))


@given(**_SHAPES)
@drawn(3)
def test_any_shape(**shape):
    _property_body(**shape)


@pytest.mark.slow
@given(**_SHAPES)
@drawn(25)
def test_any_shape_at_length(**shape):
    _property_body(**shape)


@pytest.mark.parametrize("form", ["decode", pytest.param("packed draft+context", marks=pytest.mark.slow)])
def test_no_race_in_simulated_tpu_memory(form):
    """Mosaic's own simulator: DMAs, semaphores and buffers as on the chip, memory that was never written is NaN."""
    case = attention_case(12, B=2, **FORMS[form])
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with lowering_for("tpu"), tuning.using(SMALL), pltpu.force_tpu_interpret_mode(params):
        grad = jax.value_and_grad(_loss("pallas"), has_aux=True)
        (_, out), _ = jax.block_until_ready(jax.jit(grad)(case.dirty, case.keywords))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    assert not simulator.races.races_found
    np.testing.assert_allclose(out, _plain(case.clean, case.keywords), rtol=1e-5, atol=1e-5)


def _drawing(mask):
    return [" ".join("x" if m else "." for m in row) for row in np.asarray(mask)]


def test_the_drawings_of_the_mask():
    """The docstring of `may_attend` is what it returns."""
    drawings = [
        may_attend(2 + jnp.arange(3)[:, None], jnp.arange(6)[None]),
        may_attend(
            jnp.arange(5)[:, None],
            jnp.arange(5)[None],
            q_segment=jnp.array([1, 1, 2, 2, 0])[:, None],
            k_segment=jnp.array([1, 1, 2, 2, 0])[None],
        ),
    ]
    text = may_attend.__doc__
    for mask in drawings:
        assert all(row in text for row in _drawing(mask))
    anchor, slot = jnp.repeat(jnp.arange(2), 3), jnp.tile(jnp.arange(3), 2)
    blocks_ = [
        _drawing(
            may_attend(
                anchor[:, None], anchor[None], q_slot=slot[:, None], k_slot=slot[None], bidirectional=bidirectional
            )
        )
        for bidirectional in (True, False)
    ]
    lines = [[x for x in line.split() if x in "x."] for line in text.splitlines()]
    for both, causal in zip(*blocks_, strict=True):
        assert [*both.split(), *causal.split()] in lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(context=None), "needs a context"),
        (dict(q=jnp.zeros((2, 4, 2, 6, 8))), "q must be"),
        (dict(start=jnp.zeros(3, jnp.int32)), "start must be"),
        (dict(q=jnp.zeros((2, 4, 5, 8))), "cannot be grouped"),
        (dict(context=(jnp.zeros((2, 2, 8, 4)),) * 2), "context must be"),
        (dict(table=jnp.zeros((3, 4), jnp.int32)), "table must be"),
        (dict(context=(jnp.zeros((9, 2, 8, 4)),) * 2, table=jnp.zeros((2, 4), jnp.int32)), "with a table"),
        (dict(segments=jnp.zeros((2, 4), jnp.int32), table=jnp.zeros((2, 4), jnp.int32)), "without segments"),
        (dict(segments=jnp.zeros((2, 3), jnp.int32)), "segments must be"),
        (dict(segments=jnp.zeros((2, 4), jnp.int32)), "need T == C"),
    ],
)
def test_shapes_that_do_not_fit(unchecked_shapes, change, message):
    arguments = dict(q=jnp.zeros((2, 4, 6, 8)), context=(jnp.zeros((2, 2, 8, 8)),) * 2, start=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=message):
        mixed_mask_attention(**(arguments | change))
