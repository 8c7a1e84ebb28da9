"""Ragged attention over a paged cache by the native body of a CPU (`pallas_kernels/cpu/attention`), for decoding.

One call writes the tokens' keys and values into their pages, in place where XLA may reuse them (a donated argument, a
loop's state, what an earlier call returned), and attends. The result of a token and head is one fixed order of
operations on its own row: the same bits however many tokens, rows and threads there are and wherever its pages lie.
"""

from __future__ import annotations

import jax
from jaxtyping import Float

from pallas_kernels import dispatch
from pallas_kernels.attention.places import Pages, Places

Array = jax.Array


def ragged(
    q: Float[Array, "T N H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"], pages: Pages, places: Places
) -> tuple[Float[Array, "T N H"], Pages]:
    """Writes the tokens' keys and values into the pages and attends causally, each token to its row up to itself.

    Returns:
      The attention's output, and the pages with the tokens in them.

    Raises:
      NotImplementedError: the native body cannot run here; the message is the reason.
    """
    dispatch.why("native", no_native=no_native_body(q, k, v, pages))
    out, keys, values = _ragged(q, k, v, *pages, places.row, places.position, places.table)
    return out, (keys, values)


def no_native_body(q: Array, k: Array, v: Array, pages: Pages) -> str | None:
    """Why the native body cannot take these arrays, as a phrase; None where it can."""
    dtypes = sorted({x.dtype.name for x in (q, k, v, *pages)})
    if len(dtypes) > 1 or dtypes[0] not in ("bfloat16", "float32"):
        return f"it attends in bfloat16 or float32 alone, not {' and '.join(dtypes)}"
    return None


@jax.custom_vjp
def _ragged(q, k, v, keys, values, row, position, table):
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, keys, values)]
    call = jax.ffi.ffi_call(
        "specformer_ragged_attention", results, vmap_method="sequential", input_output_aliases={3: 1, 4: 2}
    )
    return call(q, k, v, keys, values, row, position, table)


def _no_gradient(*_):
    raise NotImplementedError("attention over a paged cache is for decoding and has no gradient")


_ragged.defvjp(_no_gradient, _no_gradient)
