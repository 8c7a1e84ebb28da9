"""The building blocks of target and head: norm, rotary positions, attention, SwiGLU. They take sizes, not configs.

Activations are in the compute dtype; statistics and accumulation are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import PackedMatrix, Places, dispatch, matmul, rms_norm, split_and_rotate, swiglu
from pallas_kernels.rotary.reference import rotate, split
from specformer_jax.config import RopeScaling
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn.sharded_kernels import ragged_attention
from specformer_jax.nn.window import windowed_attention

_output_init = nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)


def weights(module: nn.Module, name: str, init, shape: tuple[int, ...]) -> Array | PackedMatrix:
    """A module's parameter for `matmul`: the plain array, or what loading for a CPU has packed in its place."""
    stored = module.get_variable("params", name)
    return stored if isinstance(stored, PackedMatrix) else module.param(name, init, shape)


class RMSNorm(nn.Module):
    """RMS norm over the last axis with one learned scale a channel, starting at 1."""

    epsilon: float
    axis_name: str | None = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), (self.axis_name,))
        return rms_norm(x, self.param("scale", init, (x.shape[-1],)), epsilon=self.epsilon)


def positions(
    batch: tuple[int, ...], places: Places | None, segments: Int32[Array, "B T"] | None
) -> Int32[Array, "*batch"]:
    """The rotary positions of a flat batch, of packed documents, or of whole sequences [B, T] that start at 0."""
    if places is not None:
        return jnp.maximum(places.position, 0)
    if segments is not None:
        return document_positions(segments)
    return jnp.broadcast_to(jnp.arange(batch[-1]), batch)


def document_positions(segments: Int32[Array, "B T"]) -> Int32[Array, "B T"]:
    """Positions that restart with each document of a packed sequence.

    >>> document_positions(jnp.array([[1, 1, 1, 2, 2, 0]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
    """
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles of some positions, one for each pair of a head's channels."""

    cos: Float32[Array, "*batch H/2"]
    sin: Float32[Array, "*batch H/2"]


def rotary(positions: Int32[Array, "*batch"], head_size: int, theta: float, scaling: RopeScaling | None) -> Rotary:
    """The rotary embedding of absolute positions."""
    frequency = theta ** -(jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    if scaling is not None:
        # Llama-3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
        wavelength = 2 * jnp.pi / frequency
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        smooth = jnp.clip((scaling.original_context / wavelength - low) / (high - low), 0, 1)
        frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    angles = positions[..., None].astype(jnp.float32) * frequency
    return Rotary(_once(jnp.cos(angles)), _once(jnp.sin(angles)))


def _once(x: Array) -> Array:
    """x itself; XLA's CPU backend would compute it anew for every head of every layer that reads it."""
    if dispatch.platform() != "cpu":
        return x
    # A product is never merged into what reads it; this one with the identity is exact.
    return jnp.dot(x, jnp.eye(x.shape[-1]), precision=jax.lax.Precision.HIGHEST)


class QKV(nn.Module):
    """The query, key and value heads of x in one product; queries and keys stand at their rotary positions, if any.

    The kernel is [D, K, N/K + 2, H]: each key/value head lies beside its queries, so sharding K splits whole groups.
    """

    heads: int
    kv_heads: int
    head_size: int
    bias: bool
    norm_epsilon: float | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch D"], rotary: Rotary | None
    ) -> tuple[Float[Array, "*batch N H"], Float[Array, "*batch K H"], Float[Array, "*batch K H"]]:
        group = self.heads // self.kv_heads
        shape = (self.kv_heads, group + 2, self.head_size)
        axes = ("kv_heads", "group", "head")
        kernel_init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        init = nn.with_logical_partitioning(kernel_init, ("embed", *axes))
        qkv = matmul(x, weights(self, "kernel", init, (x.shape[-1], *shape)))
        if self.bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)
            qkv += self.param("bias", bias_init, shape).astype(x.dtype)
        if self.norm_epsilon is None and rotary is not None:
            return split_and_rotate(qkv, *rotary)
        q, k, v = split(qkv)
        if self.norm_epsilon is not None:
            q = RMSNorm(self.norm_epsilon, "head", name="q_norm")(q)
            k = RMSNorm(self.norm_epsilon, "head", name="k_norm")(k)
        return (q, k, v) if rotary is None else (rotate(q, *rotary), rotate(k, *rotary), v)


class Output(nn.Module):
    """The product that takes the heads back to the width."""

    width: int
    kernel_init: nn.initializers.Initializer = _output_init

    @nn.compact
    def __call__(self, heads: Float[Array, "*batch N H"]) -> Float[Array, "*batch D"]:
        init = nn.with_logical_partitioning(self.kernel_init, ("heads", "head", "embed"))
        return matmul(heads, weights(self, "kernel", init, (*heads.shape[-2:], self.width)), axes=2)


class CausalAttention(nn.Module):
    """Self-attention with rotary positions over a KV cache, or over the sequence itself when there is none.

    Used by every target layer and by the head's context causal attention (layer L + 1).

    Attributes:
      window: how many positions each one attends to at least, itself counted, and what precedes them on their page; in
        a flat batch those of a row's first token count for all that is read with it. None: to all.
    """

    heads: int
    kv_heads: int
    head_size: int
    bias: bool = False
    norm_epsilon: float | None = None
    output_init: nn.initializers.Initializer = _output_init
    window: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch D"],
        rotary: Rotary,
        kv: cache_lib.LayerKV | None = None,
        places: Places | None = None,
        segments: Int32[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "*batch D"], cache_lib.LayerKV]:
        """Attends from each position to itself and what lies before it.

        Args:
          x: the inputs: a flat batch [T, D] with a cache, whole sequences [B, T, D] without.
          rotary: the angles of their positions.
          kv: one layer of the cache, or None for whole sequences that start at 0.
          places: where the tokens of a flat batch stand.
          segments: the document of each position in a packed sequence (0 is padding); only without kv, and only in
            sequences no longer than the window.

        Returns:
          What the positions attended to, and the keys and values with these tokens written.
        """
        qkv = QKV(self.heads, self.kv_heads, self.head_size, self.bias, self.norm_epsilon, name="qkv")
        q, k, v = qkv(x, rotary)
        if kv is not None:
            assert places is not None
            near = places if self.window is None else places.windowed(self.window, kv.k.shape[2])
            heads, kv = ragged_attention(q, k, v, kv, near)
        else:
            kv = cache_lib.LayerKV(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
            start = jnp.zeros(len(q), jnp.int32)
            heads = windowed_attention(q, kv, start=start, window=self.window, segments=segments)
        return Output(x.shape[-1], self.output_init, name="out")(heads), kv


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product; the output is as wide as the input unless `width` says.

    `share`, if given, is what other inputs bring to gate and up.
    """

    ffn: int
    down_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    width: int | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch inputs"], share: Float[Array, "*batch 2 F"] | None = None
    ) -> Float[Array, "*batch D"]:
        wide_init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        wide = nn.with_logical_partitioning(wide_init, ("embed", "gate", "ffn"))
        narrow = nn.with_logical_partitioning(self.down_init, ("ffn", "embed"))
        gate_up = matmul(x, weights(self, "gate_up", wide, (x.shape[-1], 2, self.ffn)))
        gate_up = gate_up if share is None else gate_up + share
        return matmul(swiglu(gate_up), weights(self, "down", narrow, (self.ffn, self.width or x.shape[-1])))
