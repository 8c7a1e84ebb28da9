"""Per-row sampling parameters as arrays, so that one compiled program serves every mixture of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specformer_jax.config import SamplingParams

Array = jax.Array


class RowSampling(NamedTuple):
    """How each row of a batch is sampled; the fields are those of `SamplingParams`.

    Attributes:
      temperature: f32[B], 0 = greedy.
      top_k: i32[B], 0 = off.
      top_p: f32[B], 1 = off.
      min_p: f32[B], 0 = off.
      seed: u32[B].
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    seed: Array

    def repeat(self, times: int) -> RowSampling:
        """Each row `times` times in a row: [B] -> [B * times]."""
        return jax.tree.map(lambda x: jnp.repeat(x, times), self)


def stack(params: Sequence[SamplingParams]) -> RowSampling:
    """One array a field from one `SamplingParams` a row."""
    return RowSampling(
        temperature=jnp.asarray(np.array([p.temperature for p in params], np.float32)),
        top_k=jnp.asarray(np.array([p.top_k for p in params], np.int32)),
        top_p=jnp.asarray(np.array([p.top_p for p in params], np.float32)),
        min_p=jnp.asarray(np.array([p.min_p for p in params], np.float32)),
        seed=jnp.asarray(np.array([p.seed for p in params], np.uint32)),
    )
