"""An EAGLE-style drafter: one decoder layer that goes on autoregressively from the target's hidden states.

The EAGLE-3 recipe (Li et al., arXiv 2503.01840): low, middle and high hidden states are fused to one vector g; the
layer reads the embedding of the token after a position beside g at that position, and its output forecasts the token
after that. For the slots that follow it is fed the token just drafted and its own output in place of g, which the
target has not computed yet; training unrolls the same steps. A chain, not a tree.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from specformer_jax.drafters.base import Drafter, masters
from specformer_jax.drafters.specformer import Downsampler
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn import layers
from specformer_jax.nn.sharded_kernels import mixed_mask_attention, ragged_attention

_zeros = nn.initializers.zeros_init()


class Eagle(Drafter):
    """It starts as the identity: the fusion passes HS[L], and what adds to a residual is zero."""

    def setup(self):
        t, c = self.target, self.config
        self.fuse = Downsampler(t.width, c.hook_layers, t.rms_epsilon)
        self.embedding_norm = layers.RMSNorm(t.rms_epsilon)
        self.hidden_norm = layers.RMSNorm(t.rms_epsilon)
        self.qkv = layers.QKV(t.heads, t.kv_heads, t.head_size, t.qkv_bias, t.rms_epsilon if t.qk_norm else None)
        self.out = layers.Output(t.width, _zeros)
        self.ffn_norm = layers.RMSNorm(t.rms_epsilon)
        self.ffn = layers.SwiGLU(c.ffn or t.ffn, _zeros)

    def context(self, hooks, next_embedding, memory=None, places=None, segments=None):
        """The layer over the fused states, layer L + 1 of the cache written: at an anchor this is slot 0."""
        g = self.fuse(hooks.astype(self.dtype))
        q, k, v = self._heads(next_embedding, g, layers.positions(g.shape[:-1], places, segments))
        if memory is not None:
            heads, memory = ragged_attention(q, k, v, memory, places)
        else:
            memory = cache_lib.LayerKV(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
            heads = mixed_mask_attention(q, memory, start=jnp.zeros(len(q), jnp.int32), segments=segments)
        return self._rest(g, heads), memory

    def forecast(self, context, memory, start, before, count, segments=None, table=None):
        """Slot by slot; slot j sits at the anchor + j and attends to the anchor's context and the slots before it."""
        positions = self.anchors(start, context.shape[1], segments)
        state, slots, heads = context, [self._slot(context)], []
        for j in range(1, count):
            heads.append(self._heads(before(j, slots[-1]), state, positions + j))
            q, k, v = (jnp.stack(x, axis=2) for x in zip(*heads, strict=True))  # [B, A, j, ...]
            attended = mixed_mask_attention(
                q, memory, (k, v), start=start, table=table, segments=segments, bidirectional=False
            )
            state = self._rest(state, attended[:, :, -1])
            slots.append(self._slot(state))
        return jnp.stack(slots, axis=2)

    def start_from_target(self, params, last_layer):
        """Queries, keys and values of the hidden half, and the FFN, begin as the target's last layer reads."""
        params = jax.tree.map(lambda x: x, params)
        params["hidden_norm"] = masters(last_layer["attention_norm"])
        qkv = params["qkv"]["kernel"]
        params["qkv"] = masters(last_layer["attention"]["qkv"])
        params["qkv"]["kernel"] = qkv.at[self.target.width :].set(last_layer["attention"]["qkv"]["kernel"])
        if params["ffn"]["gate_up"].shape == last_layer["ffn"]["gate_up"].shape:
            params["ffn_norm"] = masters(last_layer["ffn_norm"])
            params["ffn"]["gate_up"] = masters(last_layer["ffn"]["gate_up"])
        return params

    def _heads(
        self, embedding: Float[Array, "*batch D"], hidden: Float[Array, "*batch D"], positions: Int32[Array, "*batch"]
    ) -> tuple[Float[Array, "*batch N H"], Float[Array, "*batch K H"], Float[Array, "*batch K H"]]:
        """Rotated queries and keys, and values, of tokens and hidden states at some positions."""
        x = [self.embedding_norm(embedding.astype(hidden.dtype)), self.hidden_norm(hidden)]
        return self.qkv(jnp.concatenate(x, axis=-1), self.rotary(positions))

    def _rest(self, hidden: Float[Array, "*batch D"], heads: Float[Array, "*batch N H"]) -> Float[Array, "*batch D"]:
        """The layer after its attention."""
        hidden = hidden + self.out(heads)
        return hidden + self.ffn(self.ffn_norm(hidden))

    def _slot(self, state: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """What is forecast from a state; the next step is fed the state itself."""
        return state
