"""The SpecFormer draft head (paper section 3.2): causal over the context, bidirectional over the draft.

`context` reads the target's hooks as layer L + 1 of the target would; `propose` turns one position's context into the
hidden states of all J draft slots at once. A sequential FFN, which the paper does not have, then tells each slot which
token was drafted before it.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import matmul
from specformer_jax.config import DraftConfig, TargetConfig
from specformer_jax.drafters.base import Drafter, masters
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn import layers
from specformer_jax.nn.sharded_kernels import grouped_rms_norm_downsample, mixed_mask_attention, whole_columns

_zeros = nn.initializers.zeros_init()


class SpecFormer(Drafter):
    """The hybrid head as a pure function of its parameters.

    It starts as the identity: the downsampler passes HS[L], every slot of the positional FFN passes its input, and
    the products that add to a residual are zero, so an untrained head forecasts what the target's last hidden state
    says. (The paper does not give its initialisation.)
    """

    def setup(self):
        t, c = self.target, self.config
        self.downsampler = Downsampler(t.width, c.hook_layers, t.rms_epsilon)
        self.context_norm = layers.RMSNorm(t.rms_epsilon)
        self.context_attention = layers.CausalAttention(
            t.heads, t.kv_heads, t.head_size, t.qkv_bias, t.rms_epsilon if t.qk_norm else None, _zeros, c.window
        )
        self.slots = (
            PositionalFFN(c.max_draft_length, t.rms_epsilon)
            if c.positional_ffn
            else PositionEmbedding(c.max_draft_length)
        )
        self.blocks = [DraftBlock(t, c, name=f"block_{i}") for i in range(c.draft_blocks)]
        if c.sequential_ffn:
            self.sequential = SequentialFFN(t.width, c.sequential_ffn, t.rms_epsilon)

    def context(self, hooks, next_embedding, memory=None, places=None, segments=None):
        """Hooks -> downsample -> context causal attention with a residual (paper eqs. 7 and 8).

        Its memory is layer L + 1 of the cache; the arguments are those of `Drafter.context`.
        """
        if self.config.next_token_hook:
            hooks = hooks.at[..., self.config.hook_layers.index(0), :].set(next_embedding.astype(hooks.dtype))
        x = whole_columns(self.downsampler(hooks.astype(self.dtype)))
        rotary = self.rotary(layers.positions(x.shape[:-1], places, segments))
        y, memory = self.context_attention(self.context_norm(x), rotary, memory, places, segments)
        return x + y, memory

    def propose(
        self,
        context: Float[Array, "B A D"],
        memory: cache_lib.LayerKV,
        start: Int32[Array, " B"],
        segments: Int32[Array, "B A"] | None = None,
        table: Int32[Array, "B tables"] | None = None,
    ) -> Float[Array, "B A J D"]:
        """Positional FFN, then the draft blocks: every slot's hidden state from its anchor's context alone.

        Args:
          context: what `context` gave at the anchors.
          memory: layer L + 1 of the cache, which a head with `attends_context` also reads.
          start, segments, table: as in `Drafter.forecast`.

        Returns:
          The slots, before the target's final norm and LM head.
        """
        x = whole_columns(self.slots(context))
        rotary = None
        if self.config.attends_context:
            anchors = self.anchors(start, context.shape[1], segments)
            rotary = self.rotary(anchors[..., None] + 1 + jnp.arange(x.shape[2]))
        for block in self.blocks:
            x = block(x, memory, rotary, start, segments, table)
        return x

    def forecast(self, context, memory, start, before, count, segments=None, table=None):
        """`propose`, and each slot told of the token before it where the head has a sequential FFN."""
        slots = self.propose(context, memory, start, segments, table)[:, :, :count]
        if not self.config.sequential_ffn:
            return slots
        shares = self.sequential.share(slots)
        previous: Array = context
        followed: list[Array] = []
        for j in range(count):
            embedding = before(j, followed[-1] if followed else None)
            previous = self.sequential(slots[:, :, j], shares[:, :, j], previous, embedding)
            followed.append(previous)
        return jnp.stack(followed, axis=2)

    def start_from_target(self, params, last_layer):
        """The attentions and FFNs read as the target's last layer does; the head still starts as the identity."""
        params = jax.tree.map(lambda x: x, params)
        params["context_norm"] = masters(last_layer["attention_norm"])
        params["context_attention"]["qkv"] = masters(last_layer["attention"]["qkv"])
        for i in range(self.config.draft_blocks):
            block = params[f"block_{i}"]
            block["attention_norm"] = masters(last_layer["attention_norm"])
            block["qkv"]["kernel"] = masters(last_layer["attention"]["qkv"]["kernel"])
            if block["ffn"]["gate_up"].shape == last_layer["ffn"]["gate_up"].shape:
                block["ffn_norm"] = masters(last_layer["ffn_norm"])
                block["ffn"]["gate_up"] = masters(last_layer["ffn"]["gate_up"])
        return params


class Downsampler(nn.Module):
    """Grouped RMS norm, a scale per hook, and one bias-free product 4D -> D (paper eq. 7)."""

    width: int
    hook_layers: tuple[int, ...]
    epsilon: float

    @nn.compact
    def __call__(self, hooks: Float[Array, "*batch G D"]) -> Float[Array, "*batch D"]:
        def pass_last(key, shape, dtype=jnp.float32):
            return jnp.zeros(shape, dtype).at[shape[0] - 1].set(jnp.eye(shape[1], dtype=dtype))

        groups = len(self.hook_layers)
        scale_init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("hook", "embed"))
        kernel_init = nn.with_logical_partitioning(pass_last, ("hook", "embed", "embed_out"))
        scale = self.param("scale", scale_init, (groups, self.width))
        kernel = layers.weights(self, "kernel", kernel_init, (groups, self.width, self.width))
        return grouped_rms_norm_downsample(hooks, scale.astype(hooks.dtype), kernel, epsilon=self.epsilon)


class PositionalFFN(nn.Module):
    """One product with bias D -> J*D on the normed context, no residual (paper eq. 9)."""

    slots: int
    epsilon: float

    @nn.compact
    def __call__(self, context: Float[Array, "B T D"]) -> Float[Array, "B T J D"]:
        def pass_input(key, shape, dtype=jnp.float32):
            return jnp.broadcast_to(jnp.eye(shape[0], dtype=dtype)[:, None], shape)

        width = context.shape[-1]
        kernel_init = nn.with_logical_partitioning(pass_input, ("embed", "slot", "embed_out"))
        bias_init = nn.with_logical_partitioning(_zeros, ("slot", "embed_out"))
        kernel = layers.weights(self, "kernel", kernel_init, (width, self.slots, width))
        bias = self.param("bias", bias_init, (self.slots, width))
        normed = layers.RMSNorm(self.epsilon, name="norm")(context)
        return matmul(normed, kernel) + bias.astype(context.dtype)


class PositionEmbedding(nn.Module):
    """The paper's ablation of the positional FFN: the context plus one vector a slot (Table 4)."""

    slots: int

    @nn.compact
    def __call__(self, context: Float[Array, "B T D"]) -> Float[Array, "B T J D"]:
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("slot", "embed"))
        embedding = self.param("embedding", init, (self.slots, context.shape[-1]))
        return context[..., None, :] + embedding.astype(context.dtype)


class SequentialFFN(nn.Module):
    """Corrects a slot by what came before it, with a residual: a SwiGLU FFN of three normed vectors, 3D -> D.

    What the slots themselves bring to gate and up waits for no token, so it is one product for all of them.
    """

    width: int
    ffn: int
    epsilon: float

    def setup(self):
        self.slot_norm, self.before_norm, self.embedding_norm = (layers.RMSNorm(self.epsilon) for _ in range(3))
        init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        wide = nn.with_logical_partitioning(init, ("embed", "gate", "ffn"))
        self.slot_gate_up = layers.weights(self, "slot_gate_up", wide, (self.width, 2, self.ffn))
        self.swiglu = layers.SwiGLU(self.ffn, down_init=_zeros, width=self.width, name="ffn")

    def share(self, slots: Float[Array, "B T J D"]) -> Float[Array, "B T J 2 F"]:
        """What the slots bring to gate and up."""
        return matmul(self.slot_norm(slots), self.slot_gate_up)

    def __call__(
        self,
        slot: Float[Array, "B T D"],
        share: Float[Array, "B T 2 F"],
        before: Float[Array, "B T D"],
        embedding: Float[Array, "B T D"],
    ) -> Float[Array, "B T D"]:
        """One slot corrected by its `share`, the corrected slot before it and the embedding of the token between."""
        normed = [self.before_norm(before), self.embedding_norm(embedding.astype(slot.dtype))]
        return slot + self.swiglu(jnp.concatenate(normed, axis=-1), share)


class DraftBlock(nn.Module):
    """Draft bidirectional attention and SwiGLU, pre-norm, each with a residual (paper eq. 10).

    The paper's attention has no positions and sees the J slots alone. With `attends_context` slot j sits at the
    anchor's position + 1 + j, and the same softmax also covers the context attention's cached keys and values.
    """

    target: TargetConfig
    config: DraftConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B A J D"],
        context: cache_lib.LayerKV,
        rotary: layers.Rotary | None,
        start: Int32[Array, " B"],
        segments: Int32[Array, "B A"] | None,
        table: Int32[Array, "B tables"] | None,
    ) -> Float[Array, "B A J D"]:
        t, c = self.target, self.config
        norm = layers.RMSNorm(t.rms_epsilon, name="attention_norm")
        qkv = layers.QKV(t.heads, t.kv_heads, t.head_size, bias=False, norm_epsilon=None, name="qkv")
        q, k, v = qkv(norm(x), rotary)
        heads = mixed_mask_attention(
            q,
            context if c.attends_context else None,
            (k, v),
            start=start,
            table=table if c.attends_context else None,
            segments=segments,
            bidirectional=c.bidirectional,
        )
        x += layers.Output(t.width, kernel_init=_zeros, name="out")(heads)
        ffn = layers.SwiGLU(c.ffn or t.ffn, down_init=_zeros, name="ffn")
        return x + ffn(layers.RMSNorm(t.rms_epsilon, name="ffn_norm")(x))
