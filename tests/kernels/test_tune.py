"""autotune measures what runs and skips what does not."""

import jax.numpy as jnp
import pytest

from pallas_kernels import tune, tuning


def test_autotune_takes_the_fastest_that_runs():
    slow, fast, broken = (tuning.AttentionBlocks(n, 128) for n in (512, 8, 0))

    def call():
        size = tuning.pick(tuning.AttentionBlocks, "tpu", jnp.float32, 8)
        if size == broken:
            raise ValueError("does not compile")
        x = jnp.ones((size.rows, 512))
        for _ in range(20):
            x = jnp.tanh(x @ jnp.ones((512, 512)) / 512)
        return x

    best, seconds = tune.autotune(call, tuning.AttentionBlocks, [slow, fast, broken], repeats=3)
    assert best == fast and set(seconds) == {slow, fast}
    with pytest.raises(RuntimeError, match="does not compile"):
        tune.autotune(call, tuning.AttentionBlocks, [broken])


@pytest.mark.parametrize("kind", [tuning.AttentionBlocks, tuning.SampleBlocks, tuning.NormBlocks])
def test_there_are_candidates(kind):
    assert all(isinstance(size, kind) for size in tune.candidates(kind))
