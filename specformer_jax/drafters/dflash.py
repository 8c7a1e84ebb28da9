"""DFlash heads (arXiv 2602.06036): a block of masked tokens is filled in at once, by layers that read the target.

Hidden states of several of the target's layers are fused to one vector a position, from which every draft layer makes
keys and values of the context: what the target knows is injected into each of them. The block is the token after the
anchor and a mask for each token to be drafted; its tokens see the context and one another, in both directions.
Published heads may have layers of another `Span`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import matmul
from pallas_kernels.rotary.reference import rotate
from specformer_jax.config import TargetConfig
from specformer_jax.drafters.base import Drafter
from specformer_jax.drafters.fusion import Fusion
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn import layers
from specformer_jax.nn.sharded_kernels import ragged_attention
from specformer_jax.nn.window import windowed_attention

_zeros = nn.initializers.zeros_init()


class Span(NamedTuple):
    """What a layer's attention reads.

    Attributes:
      window: how many positions of the context at least, up to whole pages; None: all.
      bidirectional: whether a token of the block also sees those after it.
    """

    window: int | None = None
    bidirectional: bool = True


class DFlash(Drafter):
    """A published head, or one that is trained here; what adds to a residual is zero at its start.

    It remembers the context's keys and values of each of its layers. The whole block is always filled in, as the head
    was trained to: the first drafts are the same whatever their number.

    Attributes:
      decoder: the sizes and rotary positions of its layers, as wide as the target; None takes the target's, and
        `draft_blocks` and `ffn` of `config`.
      spans: what each of its layers reads; empty: all of it, everywhere.
    """

    decoder: TargetConfig | None = dataclasses.field(default=None, kw_only=True)
    spans: tuple[Span, ...] = dataclasses.field(default=(), kw_only=True)

    def setup(self):
        d = self._decoder
        self.fuse = Fusion(d.rms_epsilon)
        self.hidden_norm, self.final_norm = layers.RMSNorm(d.rms_epsilon), layers.RMSNorm(d.rms_epsilon)
        mask_init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",))
        self.mask = self.param("mask", mask_init, (d.width,))
        spans = self.spans or (Span(),) * d.layers
        self.blocks = [self._layer(d, span, name=f"layer_{i}") for i, span in enumerate(spans)]

    @property
    def norms_slots(self):
        return True

    @property
    def _layer(self) -> type[DFlashLayer]:
        return DFlashLayer

    @property
    def _decoder(self) -> TargetConfig:
        c = self.config
        return self.decoder or dataclasses.replace(self.target, layers=c.draft_blocks, ffn=c.ffn or self.target.ffn)

    def memory(self, pages):
        d = self._decoder
        return cache_lib.create(d, d.layers, pages, self.dtype)

    def rotary(self, positions):
        """The rotary embedding of its own layers."""
        d = self._decoder
        return layers.rotary(positions, d.head_size, d.rope_theta, d.rope_scaling)

    def context(self, hooks, next_embedding, memory=None, places=None, segments=None):
        """Keys and values of every layer, from the fused states; the anchors have no context but these."""
        fused = self.hidden_norm(self.fuse(hooks.astype(self.dtype)))
        rotary = self.rotary(layers.positions(fused.shape[:-1], places, segments))
        written = []
        for i, block in enumerate(self.blocks):
            k, v = block.keys_values(fused, rotary)
            if memory is None:
                written.append(cache_lib.LayerKV(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)))
            else:  # only the writing is wanted: what the keys would attend to is never looked at
                written.append(ragged_attention(k, k, v, memory[i], places)[1])
        return jnp.zeros((*hooks.shape[:-2], 0), self.dtype), tuple(written)

    def forecast(self, context, memory, start, before, count, segments=None, table=None):
        """All slots at once; they depend on no token that was drafted."""
        first = before(0, None).astype(self.dtype)[:, :, None]
        J = self.config.max_draft_length
        masks = jnp.broadcast_to(self.mask.astype(self.dtype), (*first.shape[:2], J, first.shape[-1]))
        x = jnp.concatenate([first, masks], axis=2)
        anchors = self.anchors(start, context.shape[1], segments)
        rotary = self.rotary(anchors[..., None] + 1 + jnp.arange(1 + J))
        for block, kv in zip(self.blocks, memory, strict=True):
            x = block(x, kv, rotary, start, segments, table)
        return self.final_norm(x[:, :, 1 : 1 + count])


class DFlashLayer(nn.Module):
    """Attention over the context and the block in one softmax, and a SwiGLU FFN, pre-norm, each with a residual."""

    config: TargetConfig
    span: Span

    def setup(self):
        c = self.config
        self.attention_norm, self.ffn_norm = layers.RMSNorm(c.rms_epsilon), layers.RMSNorm(c.rms_epsilon)
        self.q_norm, self.k_norm = layers.RMSNorm(c.rms_epsilon, "head"), layers.RMSNorm(c.rms_epsilon, "head")
        self.query = HeadProduct(c.kv_heads, c.heads // c.kv_heads, c.head_size)
        self.kv = HeadProduct(c.kv_heads, 2, c.head_size)
        self.out = layers.Output(c.width, _zeros)
        self.ffn = layers.SwiGLU(c.ffn, _zeros)

    def keys_values(
        self, x: Float[Array, "*batch D"], rotary: layers.Rotary
    ) -> tuple[Float[Array, "*batch K H"], Float[Array, "*batch K H"]]:
        """Keys at their positions, and values: of the context's fused states, or of the block's normed tokens."""
        kv = self.kv(x)
        return rotate(self.k_norm(kv[..., 0, :]), *rotary), kv[..., 1, :]

    def __call__(
        self,
        x: Float[Array, "B A block D"],
        context: Any,
        rotary: layers.Rotary,
        start: Int32[Array, " B"],
        segments: Int32[Array, "B A"] | None,
        table: Int32[Array, "B tables"] | None,
    ) -> Float[Array, "B A block D"]:
        y = self.attention_norm(x)
        q = self.query(y)
        q = rotate(self.q_norm(q.reshape(*y.shape[:-1], self.config.heads, self.config.head_size)), *rotary)
        attend = functools.partial(
            windowed_attention,
            q,
            draft=self.keys_values(y, rotary),
            start=start,
            segments=segments,
            table=table,
            **self.span._asdict(),
        )
        x = x + self.out(self.read(y, context, attend))
        return x + self.ffn(self.ffn_norm(x))

    def read(
        self, y: Float[Array, "B A block D"], context: Any, attend: Callable[..., Array]
    ) -> Float[Array, "B A block N H"]:
        """What the heads of a block see of the context and of the block, whose normed tokens are y."""
        return attend(context)


class HeadProduct(nn.Module):
    """Some heads of x beside each key/value head, in one product; the kernel is [D, K, heads of each, H]."""

    kv_heads: int
    each: int
    head_size: int

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch K each H"]:
        kernel_init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        init = nn.with_logical_partitioning(kernel_init, ("embed", "kv_heads", "group", "head"))
        shape = (x.shape[-1], self.kv_heads, self.each, self.head_size)
        return matmul(x, layers.weights(self, "kernel", init, shape))
