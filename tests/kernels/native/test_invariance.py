"""A token's hidden states in bfloat16 are the same bits whatever else its flat batch holds, wherever it lies there."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Places, cpu
from specformer_jax.config import RopeScaling, TargetConfig
from specformer_jax.loading import packing
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn.target import Target

if reason := cpu.unavailable():
    pytest.skip(reason, allow_module_level=True)

SIZES = (4, 6, 17, 18, 34, 81, 145)  # tokens of a flat batch
ROWS, TOKENS, CONTEXT = 40, 8, 256
MODELS = {
    # The built-in target's shape with fewer layers.
    "smollm2": TargetConfig("llama", 512, 576, 4, heads=9, kv_heads=3, head_size=64, ffn=1536, context=CONTEXT),
    # A norm of each query and key head.
    "qwen3": TargetConfig(
        "qwen3", 512, 320, 2, heads=6, kv_heads=2, head_size=128, ffn=1000, context=CONTEXT, qk_norm=True
    ),
    # Biases; scaled angles and an odd width of the FFN besides.
    "qwen2": TargetConfig(
        *("qwen2", 512, 448, 2),
        heads=7,
        kv_heads=1,
        head_size=64,
        ffn=1217,
        context=CONTEXT,
        qkv_bias=True,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
    ),
}


class Reader:
    """A model of random weights that reads rows of random tokens after random histories."""

    def __init__(self, config: TargetConfig):
        rng = np.random.default_rng(0)
        target = Target(config, tuple(range(config.layers + 1)))
        shapes = jax.eval_shape(target.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]

        def draw(x):
            inputs = x.size // x.shape[-1] if x.ndim > 1 else 1
            return rng.normal(1.0 if x.ndim == 1 else 0.0, min(0.3, inputs**-0.5), size=x.shape)

        self.params = packing.pack_tree(jax.tree.map(draw, nn.unbox(shapes)))
        self.params["embedding"] = jnp.asarray(rng.normal(size=(config.vocab_size, config.width)), jnp.bfloat16)
        tables = cache_lib.pages_for(CONTEXT)
        empty = cache_lib.create(config, config.layers, ROWS * tables, "bfloat16")
        self.histories = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(jnp.bfloat16), empty)
        self.table = jnp.asarray(rng.permutation(ROWS * tables).reshape(ROWS, tables), jnp.int32)
        self.tokens = rng.integers(config.vocab_size, size=(ROWS, TOKENS))
        self.first = rng.integers(CONTEXT - TOKENS, size=ROWS)

        @functools.partial(jax.jit, donate_argnums=2)
        def step(params, tokens, cache, places):
            out = target.apply({"params": params}, tokens, cache, places)
            return out.cache, jnp.concatenate([out.hooks, out.hidden[:, None]], axis=1)

        self.step = step

    def read(self, size: int, longest: int, seed: int) -> np.ndarray:
        """The bits of all states of all tokens, read in flat batches of a size by windows that are drawn by chance."""
        rng = np.random.default_rng(seed)
        cache, found = jax.tree.map(jnp.array, self.histories), None
        done = np.zeros(ROWS, int)
        while (done < TOKENS).any():
            row, position = rng.integers(ROWS, size=size), np.full(size, -1)
            number = np.zeros(size, int)
            at = int(rng.integers(3)) if size > 5 else 0
            for each in rng.permutation(np.flatnonzero(done < TOKENS)):
                window = min(int(rng.integers(longest)) + 1, size - at, TOKENS - done[each])
                if window < 1:
                    break
                number[at : at + window] = done[each] + np.arange(window)
                row[at : at + window], position[at : at + window] = each, self.first[each] + number[at : at + window]
                done[each] += window
                at += window + int(rng.integers(5) == 0 and size > 5)
            places = Places(jnp.asarray(row, jnp.int32), jnp.asarray(position, jnp.int32), self.table)
            tokens = jnp.asarray(self.tokens[row, number], jnp.int32)
            cache, states = self.step(self.params, tokens, cache, places)
            states = np.asarray(states).view(np.uint16)
            found = np.zeros((ROWS, TOKENS, *states.shape[1:]), np.uint16) if found is None else found
            mine = position >= 0
            found[row[mine], number[mine]] = states[mine]
        return found


@pytest.mark.parametrize("name", MODELS)
def test_a_token_has_the_same_states_in_every_flat_batch(name):
    reader = Reader(MODELS[name])
    alone = reader.read(1, 1, 0)
    assert len(np.unique(alone[:, :, -1], axis=1)) > 1
    for size in SIZES:
        for longest in (1, 5):
            got = reader.read(size, longest, size)
            differ = np.argwhere((got != alone).any(axis=(0, 1, 3)))
            assert not len(differ), f"in batches of {size} from state {differ[0]} on"
