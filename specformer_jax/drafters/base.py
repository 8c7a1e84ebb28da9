"""The seam between decoding and whatever drafts: a drafter observes what the target read, and proposes a chain.

A drafter is a Linen module over the target's hidden states, its tokens, or both. Decoding calls `context` with each
flat batch that the target has read and `draft` at each row's last accepted place; training calls `context` and
`forecast`, which `draft` is made of. What a drafter keeps of each row is its `memory`: the end of the paged cache,
written and rolled back with it. Nothing here can change an answer, only how soon it is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import Places
from specformer_jax.config import DraftConfig, TargetConfig
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn import layers


def masters(params: Any) -> Any:
    """Parameters as float32 copies, which training may update and donate."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)


class Chain(NamedTuple):
    """The drafts of some anchors.

    Attributes:
      tokens: one draft a slot; -1 is no draft.
      confidence: how sure the drafter is of each, from 0 to 1; what it is worth is found by what was accepted.
      distribution: what each draft was drawn from, over the target's vocabulary; None where nobody asks.
    """

    tokens: Int32[Array, "B A k"]
    confidence: Float32[Array, "B A k"]
    distribution: Float32[Array, "B A k V"] | None = None


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

    @property
    def norms_slots(self) -> bool:
        """Whether the slots come normed, by a norm of the drafter's own; else the target's final norm follows."""
        return False

    def __call__(
        self,
        hooks: Float[Array, "B T G D"],
        next_embedding: Float[Array, "B T D"],
        segments: Int32[Array, "B T"] | None = None,
        target_kv: cache_lib.KVCache | None = None,
    ) -> Float[Array, "B T J D"]:
        """Forecasts at every position of whole sequences.

        Args:
          hooks: the target's hidden states at the hook layers.
          next_embedding: the embedding of the token after each position.
          segments: the document of each position (0 is padding), or None.
          target_kv: the target's own keys and values of the sequences; None, where parameters are made, takes zeros.

        Returns:
          The slots, before the target's final norm unless `norms_slots`.
        """
        if target_kv is None:
            B, T = hooks.shape[:2]
            zeros = jnp.zeros((B, self.target.kv_heads, T, self.target.head_size), self.dtype)
            target_kv = (cache_lib.LayerKV(zeros, zeros),) * self.target.layers
        context, memory = self.context(hooks, next_embedding, segments=segments)
        memory = self.view(memory, target_kv)
        before = lambda j, slot: jnp.roll(next_embedding, -j, axis=1)
        start = jnp.zeros(hooks.shape[0], jnp.int32)
        return self.forecast(context, memory, start, before, self.config.max_draft_length, segments)

    def memory(self, pages: int) -> Any:
        """What it keeps of the rows, empty: here one more layer of keys and values."""
        return cache_lib.create(self.target, 1, pages, self.dtype)[0]

    def view(self, memory: Any, target_kv: cache_lib.KVCache) -> Any:
        """The memory as `forecast` and `draft` read it: as it is, or with something of the target's own beside it.

        Args:
          memory: what `context` returned.
          target_kv: the target's layers, which hold every token up to the anchors; only read.
        """
        return memory

    def context(
        self,
        hooks: Float[Array, "*batch G D"],
        next_embedding: Float[Array, "*batch D"],
        memory: Any = None,
        places: Places | None = None,
        segments: Int32[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "*batch D"], Any]:
        """Reads a flat batch [T], or whole sequences [B, T].

        Args:
          hooks: the target's hidden states at the hook layers.
          next_embedding: the embedding of the token after each position.
          memory: what `memory` made, or None for whole sequences.
          places: where the tokens of a flat batch stand.
          segments: the document of each position; whole sequences only.

        Returns:
          What the slots are forecast from, and the memory with these tokens written.
        """
        raise NotImplementedError

    def forecast(
        self,
        context: Float[Array, "B A D"],
        memory: Any,
        start: Int32[Array, " B"],
        before: Callable[[int, Array | None], Array],
        count: int,
        segments: Int32[Array, "B A"] | None = None,
        table: Int32[Array, "B tables"] | None = None,
    ) -> Float[Array, "B A {count} D"]:
        """The slots of each anchor.

        Args:
          context: what `context` gave at the anchors, which follow one another.
          memory: what `view` made of it.
          start: the absolute position of anchor 0 of each row; negative marks an empty row.
          before: (j, slot j - 1 [B, A, D], None for slot 0) -> the embedding [B, A, D] of the token before that of slot
            j: the draft in the slot before, or the committed token for slot 0. A drafter whose slots do not depend on
            it never asks.
          count: static, how many slots to make, at most J.
          segments: the document of each position; whole sequences only.
          table: the pages of each row in the memory; None for whole sequences.

        Returns:
          The slots, before the LM head and, unless `norms_slots`, the target's final norm.
        """
        raise NotImplementedError

    def draft(
        self,
        context: Float[Array, "B A D"],
        memory: Any,
        start: Int32[Array, " B"],
        token: Int32[Array, "B A"],
        history: Int32[Array, "B C"],
        count: int,
        embed: Callable[[Array], Array],
        pick: Callable[[Array, int], Chain],
        likeliest: Callable[[Array, int], Array],
        table: Int32[Array, "B tables"] | None = None,
        drawn: bool = False,
    ) -> Chain:
        """The chain at each anchor.

        Args:
          context, memory, start, table: as in `forecast`.
          token: the token after each anchor.
          history: the rows' tokens by position, those before `token` at least.
          count: static, k.
          embed: the target's embedding of tokens of any shape.
          pick: (slots j .. j + n - 1 [B, A, n, D], j) -> their tokens and confidences [B, A, n] by the draft's LM head,
            and what they were drawn from where `drawn`.
          likeliest: (hidden states [B, A, D] before the target's final norm, n) -> the target's likeliest tokens after
            them [B, A, n], best first.
          drawn: static, whether the chain shall say what its drafts were drawn from. They must then not hang on
            anything that is drawn but the drafts before them.
        """
        picked: list[Chain] = []

        def before(j: int, slot: Array | None) -> Array:
            if slot is not None:
                picked.append(pick(slot[:, :, None], j - 1))
            return embed(picked[-1].tokens[:, :, 0] if picked else token)

        slots = self.forecast(context, memory, start, before, count, table=table)
        # Slots that did not wait for the token before them are looked up together.
        picked.append(pick(slots[:, :, len(picked) :], len(picked)))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *picked)

    def certain(self, chain: Chain, drawn: bool) -> Chain:
        """A chain of drafts that nothing was drawn for, as `draft` returns it."""
        return chain._replace(distribution=jax.nn.one_hot(chain.tokens, self.target.vocab_size)) if drawn else chain

    def start_from_target(self, params: Any, last_layer: Any) -> Any:
        """Parameters whose inputs read as the target's last layer reads; what adds to a residual stays zero."""
        return params

    def anchors(
        self, start: Int32[Array, " B"], length: int, segments: Int32[Array, "B {length}"] | None
    ) -> Int32[Array, "B {length}"]:
        """The positions of anchors from `start` on, or of packed documents."""
        if segments is not None:
            return layers.document_positions(segments)
        return jnp.maximum(start, 0)[:, None] + jnp.arange(length)

    def rotary(self, positions: Int32[Array, "*batch"]) -> layers.Rotary:
        """The target's rotary embedding of some positions."""
        return layers.rotary(positions, self.target.head_size, self.target.rope_theta, self.target.rope_scaling)
