"""Sampling by the native body of a CPU (`pallas_kernels/cpu/sampling`): noise, argmax and softmax over the vocabulary.

The logits of bfloat16 hidden states never exist but for a tile of columns. The noise is of the same bits as the
reference's, its two logarithms of a rounding of their own; a greedy row draws none, whoever is sampled beside it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.sampling.reference import lm_head_logits
from pallas_kernels.sampling.tiles import Best, SampledRows, Softmax, row_operands


def best(
    hidden: Float[Array, "R D"] | None,
    x: Float[Array, "V D"] | Float[Array, "R V"],
    rows: SampledRows,
    token_ids: Int[Array, " V"] | None,
    offset: Int[Array, ""],
    *,
    confidence: bool,
) -> Best:
    """The winner of each row; x is the LM head, or the logits where there are no hidden states."""
    if hidden is not None and not hidden.dtype == x.dtype == jnp.bfloat16:
        hidden, x = None, lm_head_logits(hidden, x)
    operands = (x.astype(jnp.float32),) if hidden is None else (hidden, x)
    columns = x.shape[1 if hidden is None else 0]
    tokens = jnp.arange(columns, dtype=jnp.int32) + offset if token_ids is None else token_ids.astype(jnp.int32)
    keys, how = row_operands(rows)
    dtypes = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    call = jax.ffi.ffi_call(
        "specformer_sample_logits" if hidden is None else "specformer_sample_hidden",
        [jax.ShapeDtypeStruct((len(keys),), dtype) for dtype in dtypes],
        vmap_method="sequential",
    )
    score, column, top, mass = call(*operands, keys, how, tokens, softmax=confidence)
    return Best(score, column, Softmax(top, mass) if confidence else None)
