"""The target: a Llama, Qwen2 or Qwen3 decoder that also returns the hidden states the draft head hooks into."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import Places, dispatch
from specformer_jax.config import TargetConfig
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn import layers


class TargetOutput(NamedTuple):
    """What one pass yields, over a flat batch [T] or whole sequences [B, T].

    Attributes:
      hidden: the last layer's output after the final norm: the LM head's input.
      hooks: the hidden states HS[i] at the drafter's hook layers, before any norm.
      cache: the L target layers with these tokens' keys and values written, not yet committed.
    """

    hidden: Float[Array, "*batch D"]
    hooks: Float[Array, "*batch G D"]
    cache: cache_lib.KVCache


class DecoderLayer(nn.Module):
    """Pre-norm attention and pre-norm SwiGLU FFN, each with a residual."""

    config: TargetConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch D"],
        rotary: layers.Rotary,
        kv: cache_lib.LayerKV | None,
        places: Places | None,
        segments: Int32[Array, "B T"] | None,
    ) -> tuple[Float[Array, "*batch D"], cache_lib.LayerKV]:
        c = self.config
        attention = layers.CausalAttention(
            c.heads, c.kv_heads, c.head_size, c.qkv_bias, c.rms_epsilon if c.qk_norm else None, name="attention"
        )
        y, kv = attention(layers.RMSNorm(c.rms_epsilon, name="attention_norm")(x), rotary, kv, places, segments)
        x += y
        return x + layers.SwiGLU(c.ffn, name="ffn")(layers.RMSNorm(c.rms_epsilon, name="ffn_norm")(x)), kv


class Target(nn.Module):
    """The decoder as a pure function of its parameters.

    Attributes:
      config: sizes and variants.
      hook_layers: which HS[i] to return; HS[0] is the embedding output.
      dtype: the compute dtype; parameters are cast to it where they are used.
    """

    config: TargetConfig
    hook_layers: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    def setup(self):
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (c.vocab_size, c.width))
        self.blocks = [DecoderLayer(c, name=f"layer_{i}") for i in range(c.layers)]
        self.final_norm = layers.RMSNorm(c.rms_epsilon)
        if not c.tied_embeddings:
            self.untied_lm_head = self.param("lm_head", init, (c.vocab_size, c.width))

    def __call__(
        self,
        tokens: Int32[Array, "*batch"],
        cache: cache_lib.KVCache | None = None,
        places: Places | None = None,
        segments: Int32[Array, "B T"] | None = None,
    ) -> TargetOutput:
        """Reads a flat batch [T] of any rows' tokens against the cache, or whole sequences [B, T] without one.

        Args:
          tokens: the batch, or the sequences.
          cache: L layers of keys and values; None attends within the sequences only.
          places: where the tokens of a flat batch stand.
          segments: the document of each position where several are packed (0 is padding); without cache only. Rotary
            positions then restart with each document.
        """
        c = self.config
        x = self.embed(tokens)
        positions = layers.positions(tokens.shape, places, segments)
        rotary = layers.rotary(positions, c.head_size, c.rope_theta, c.rope_scaling)
        states = [x]
        written: list[cache_lib.LayerKV] = []
        for block in self._layers(traced=isinstance(x, jax.core.Tracer)):
            x, kv = block(x, rotary, None if cache is None else cache[len(written)], places, segments)
            states.append(x)
            written.append(kv)
        hooked = [states[i] for i in self.hook_layers]
        hooks = jnp.stack(hooked, axis=-2) if hooked else jnp.zeros((*x.shape[:-1], 0, c.width), x.dtype)
        return TargetOutput(self.final_norm(x), hooks, tuple(written))

    def _layers(self, traced: bool) -> Sequence[Callable[..., tuple[jax.Array, cache_lib.LayerKV]]]:
        """The layers in order; inside a program they are calls of one traced function, L times as fast to trace."""
        if not traced or self.is_initializing():
            return self.blocks
        layer, params = jax.jit(DecoderLayer(self.config, parent=None).apply), self.variables["params"]
        return [functools.partial(layer, {"params": params[f"layer_{i}"]}) for i in range(self.config.layers)]

    def embed(self, tokens: Int32[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """The embedding output HS[0]."""
        return look_up(self.embedding, tokens, self.dtype)

    def norm(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The frozen final norm, which the drafter shares."""
        return self.final_norm(x)


def look_up(table: Float[Array, "V D"], tokens: Int32[Array, "*batch"], dtype: str) -> Float[Array, "*batch D"]:
    """The rows of an embedding that belong to some tokens."""
    if dispatch.platform() == "cpu":
        # XLA's CPU backend gathers in float32, and would convert the whole table once a call, as dear as a step.
        table, tokens = jax.lax.optimization_barrier((table, tokens))
    return table[tokens].astype(dtype)


def lm_head(params: dict[str, Any]) -> Float[Array, "V D"]:
    """The LM-head matrix of a target's parameters: its own, or the tied embedding."""
    return params["lm_head"] if "lm_head" in params else params["embedding"]
