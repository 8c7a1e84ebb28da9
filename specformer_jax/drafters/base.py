"""The seam between decoding and whatever drafts: a drafter observes what the target read, and proposes a chain.

A drafter is a Linen module over the target's hidden states, its tokens, or both. Decoding calls `observe` with each
verified window and `draft` at its last accepted position; training calls `context` and `forecast`, which the two are
made of. What a drafter keeps of each row (keys and values, a history of tokens) is its `memory`: the last entry of the
KV cache, written and rolled back with it. Nothing here can change an answer, only how soon it is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from specformer_jax.config import DraftConfig, TargetConfig
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn import layers


def masters(params: Any) -> Any:
    """Parameters as float32 copies, which training may update and donate."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)


class Drafter(nn.Module):
    """What every drafter is; one that learns implements `context` and `forecast`.

    Slot j (from 0) at position t forecasts token t + 2 + j; token t + 1 is the target's own.

    Attributes:
      target: the target it drafts for; it takes the target's width and attention geometry.
      config: bound to that target (`DraftConfig.bind`).
      dtype: the compute dtype.
    """

    target: TargetConfig
    config: DraftConfig
    dtype: str = "bfloat16"

    def __call__(
        self,
        hooks: Float[Array, "B T G D"],
        next_embedding: Float[Array, "B T D"],
        segments: Int32[Array, "B T"] | None = None,
    ) -> Float[Array, "B T J D"]:
        """Forecasts at every position of full sequences.

        Args:
          hooks: the target's hidden states at the hook layers.
          next_embedding: the embedding of the token after each position.
          segments: the document of each position (0 is padding), or None.

        Returns:
          The slots, before the target's final norm.
        """
        start = jnp.zeros(hooks.shape[0], jnp.int32)
        context, memory = self.context(hooks, next_embedding, start, None, segments)
        before = lambda j, slot: jnp.roll(next_embedding, -j, axis=1)
        return self.forecast(context, memory, start, before, self.config.max_draft_length, segments)

    def memory(self, rows: int, positions: int) -> Any:
        """What it keeps of each row, empty: a pytree of [B, ...] arrays; here one more layer of keys and values."""
        return cache_lib.create(self.target, 1, rows, positions, self.dtype)[0]

    def context(
        self,
        hooks: Float[Array, "B T G D"],
        next_embedding: Float[Array, "B T D"],
        start: Int32[Array, " B"],
        memory: Any,
        segments: Int32[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Reads a window, or full sequences.

        Args:
          hooks: the target's hidden states at the hook layers.
          next_embedding: the embedding of the token after each position.
          start: the absolute position of hooks[:, 0]; negative marks an empty row.
          memory: what `memory` made, or None for full sequences.
          segments: the document of each position; full sequences only.

        Returns:
          What the slots are forecast from, and the memory with this window written.
        """
        raise NotImplementedError

    def forecast(
        self,
        context: Float[Array, "B T D"],
        memory: Any,
        start: Int32[Array, " B"],
        before: Callable[[int, Array | None], Array],
        count: int,
        segments: Int32[Array, "B T"] | None = None,
    ) -> Float[Array, "B T {count} D"]:
        """The slots of each anchor.

        Args:
          context: what `context` gave at the anchors.
          memory: what `context` returned.
          start: the absolute position of anchor 0 of each row; negative marks an empty row.
          before: (j, slot j - 1 [B, T, D], None for slot 0) -> the embedding [B, T, D] of the token before that of slot
            j: the draft in the slot before, or the committed token for slot 0. A drafter whose slots do not depend on
            it never asks.
          count: static, how many slots to make, at most J.
          segments: the document of each position; full sequences only.

        Returns:
          The slots, before the target's final norm and LM head.
        """
        raise NotImplementedError

    def observe(
        self,
        hooks: Float[Array, "B W G D"],
        tokens: Int32[Array, "B W"],
        next_tokens: Int32[Array, "B W"],
        start: Int32[Array, " B"],
        memory: Any,
        embed: Callable[[Array], Array],
    ) -> tuple[Float[Array, "B W _"], Any]:
        """`context` of a window, for decoding.

        Args:
          hooks: as in `context`.
          tokens: the window.
          next_tokens: the token after each window index.
          start, memory: as in `context`.
          embed: the target's embedding of tokens of any shape.
        """
        return self.context(hooks, embed(next_tokens), start, memory)

    def draft(
        self,
        context: Float[Array, "B T _"],
        memory: Any,
        start: Int32[Array, " B"],
        token: Int32[Array, "B T"],
        count: int,
        embed: Callable[[Array], Array],
        pick: Callable[[Array, int], Array],
    ) -> Int32[Array, "B T {count}"]:
        """The chain at each anchor.

        Args:
          context, memory, start: as in `forecast`.
          token: the token after each anchor.
          count: static, k.
          embed: as in `observe`.
          pick: (slots j .. j + n - 1 [B, T, n, D], j) -> their tokens [B, T, n] by the draft's LM head.

        Returns:
          The drafts of each anchor; -1 is no draft.
        """
        picked: list[Array] = []

        def before(j: int, slot: Array | None) -> Array:
            if slot is not None:
                picked.append(pick(slot[:, :, None], j - 1))
            return embed(picked[-1][:, :, 0] if picked else token)

        slots = self.forecast(context, memory, start, before, count)
        # Slots that did not wait for the token before them are looked up together.
        return jnp.concatenate([*picked, pick(slots[:, :, len(picked) :], len(picked))], axis=2)

    def start_from_target(self, params: Any, last_layer: Any) -> Any:
        """Parameters whose inputs read as the target's last layer reads; what adds to a residual stays zero."""
        return params

    def positions(
        self, start: Int32[Array, " B"], length: int, segments: Int32[Array, "B {length}"] | None
    ) -> Int32[Array, "B {length}"]:
        """The positions from `start` on, or of packed documents."""
        if segments is not None:
            return layers.document_positions(segments)
        return jnp.maximum(start, 0)[:, None] + jnp.arange(length)

    def rotary(self, positions: Int32[Array, "*batch"]) -> layers.Rotary:
        """The target's rotary embedding of some positions."""
        return layers.rotary(positions, self.target.head_size, self.target.rope_theta, self.target.rope_scaling)
