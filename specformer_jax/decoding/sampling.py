"""Per-row sampling parameters as arrays, so that one compiled program serves every mixture of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt32

from specformer_jax.config import SamplingParams
from specformer_jax.decoding import processors
from specformer_jax.decoding.processors import RowProcessors

GREEDY_BELOW = 1e-5  # only a tie tells such a temperature from greedy, and logits divided by one near 0 leave float32


class RowSampling(NamedTuple):
    """How each row of a batch is sampled; the fields mean what those of `SamplingParams` do.

    Attributes:
      processors: what is done to the logits before; None does nothing to any row's, and compiles nothing.
    """

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    seed: UInt32[Array, " B"]
    processors: RowProcessors | None = None

    def at(self, rows: Int32[Array, " R"]) -> RowSampling:
        """How these rows are sampled; a row past the last is greedy."""
        return jax.tree.map(lambda x: x.at[rows].get(mode="fill", fill_value=0), self)

    def repeat(self, times: int) -> RowSampling:
        """Each row `times` times in a row: [B] -> [B * times]."""
        return jax.tree.map(lambda x: jnp.repeat(x, times), self)


def stack(sampling_params: Sequence[SamplingParams]) -> RowSampling:
    """One array a field from one `SamplingParams` a row; temperatures below `GREEDY_BELOW` are greedy."""
    temperature = np.array([p.temperature for p in sampling_params], np.float32)
    return RowSampling(
        temperature=jnp.asarray(np.where(temperature < GREEDY_BELOW, 0, temperature)),
        top_k=jnp.asarray(np.array([p.top_k for p in sampling_params], np.int32)),
        top_p=jnp.asarray(np.array([p.top_p for p in sampling_params], np.float32)),
        min_p=jnp.asarray(np.array([p.min_p for p in sampling_params], np.float32)),
        seed=jnp.asarray(np.array([p.seed for p in sampling_params], np.uint32)),
        processors=processors.stack(sampling_params) if any(p.processes for p in sampling_params) else None,
    )


def distribution(
    logits: Float[Array, "R V"], temperature: Float32[Array, " R"], threshold: Float32[Array, " R"] | None = None
) -> Float32[Array, "R V"]:
    """What `sample_logits` draws from, by its logits, temperature and threshold; greedy rows are certain."""
    logits = logits.astype(jnp.float32)
    greedy = jax.nn.one_hot(jnp.argmax(logits, axis=1), logits.shape[1])
    kept = logits if threshold is None else jnp.where(logits >= threshold[:, None], logits, -jnp.inf)
    sampled = jax.nn.softmax(kept / jnp.where(temperature > 0, temperature, 1.0)[:, None], axis=1)
    return jnp.where(temperature[:, None] > 0, sampled, greedy)
