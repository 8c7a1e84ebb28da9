"""A target and its draft head as one static value; the arrays live in a `Params` tree beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specformer_jax import cache as cache_lib
from specformer_jax.draft import DraftHead
from specformer_jax.kernels import sample_hidden
from specformer_jax.sampling import RowSampling
from specformer_jax.target import Target, TargetOutput, lm_head

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """What is static of a target and its draft head: hashable, so that `jax.jit` takes it as a static argument.

    The methods are pure functions of a `Params` tree:

        {"target": ..., "draft": ..., "draft_vocab": {"token_ids": i32[V'], "lm_head": f[V', D]}}

    "draft" is there for a model with a head, "draft_vocab" for a head with a pruned draft vocabulary.

    Attributes:
      target: the decoder.
      head: the draft head, or None for plain decoding.
      truncation: compile top-k, top-p and min-p in; without them no [B, W, V] array exists on an accelerator.
      coupled: drafts are chosen with the noise that the target will use, so that they agree more often when
        sampling; False takes their argmax. Neither changes the output.
    """

    target: Target
    head: DraftHead | None = None
    truncation: bool = True
    coupled: bool = True

    @property
    def max_draft_length(self) -> int:
        """J, or 0 without a head."""
        return 0 if self.head is None else self.head.config.max_draft_length

    @property
    def cache_layers(self) -> int:
        """L, and one more for the head's context attention."""
        return self.target.config.layers + (self.head is not None)

    def read(self, params: Params, tokens: Array, start: Array, cache: cache_lib.KVCache) -> TargetOutput:
        """The target's pass over a window: i32[B, W] at positions from `start` i32[B]; negative: empty row."""
        layers = self.target.config.layers
        out = self.target.apply({"params": params["target"]}, tokens, start, cache[:layers])
        return out._replace(cache=out.cache + cache[layers:])

    def context(
        self, params: Params, hooks: Array, next_tokens: Array, start: Array, cache: cache_lib.KVCache
    ) -> tuple[Array, cache_lib.KVCache]:
        """The head's causal context of a window, layer L + 1 written.

        Args:
          hooks: f[B, W, G, D], of `read`.
          next_tokens: i32[B, W], the token after each window index (read by a head with `next_token_hook`).
        """
        assert self.head is not None
        following = self.target.apply({"params": params["target"]}, next_tokens, method="embed")
        context, kv = self.head.apply({"params": params["draft"]}, hooks, following, start, cache[-1], method="context")
        return context, (*cache[:-1], kv)

    def propose(self, params: Params, context: Array, cache: cache_lib.KVCache, anchor: Array) -> Array:
        """All J slots from the context at one position of each row.

        Args:
          context: f[B, D], at each row's anchor.
          anchor: i32[B], its absolute position; negative: empty row.

        Returns:
          f[B, J, D].
        """
        assert self.head is not None
        return self.head.apply({"params": params["draft"]}, context[:, None], cache[-1], anchor, method="propose")[:, 0]

    def chain(
        self, params: Params, slots: Array, context: Array, token: Array, position: Array, sampling: RowSampling
    ) -> Array:
        """The drafts of some slots: all at once, or each after the one before it for a head with `sequential_ffn`.

        Args:
          slots: f[B, k, D], of `propose`.
          context: f[B, D], at each row's anchor.
          token: i32[B], the token after the anchor.
          position: i32[B], absolute position of the first draft.
          sampling: of each row, [B].

        Returns:
          i32[B, k].
        """
        assert self.head is not None
        if not self.head.config.sequential_ffn:
            return self._pick(params, slots, position, sampling)
        before, drafts = context, []
        for j in range(slots.shape[1]):
            embedding = self.target.apply({"params": params["target"]}, token, method="embed")
            before = self.head.apply({"params": params["draft"]}, slots[:, j], before, embedding, method="follow")
            token = self._pick(params, before[:, None], position + j, sampling)[:, 0]
            drafts.append(token)
        return jnp.stack(drafts, axis=1)

    def _pick(self, params: Params, slots: Array, position: Array, sampling: RowSampling) -> Array:
        """The draft's token of each slot: f[B, k, D] at positions from i32[B] -> i32[B, k]."""
        hidden = self.target.apply({"params": params["target"]}, slots, method="norm")
        vocab = params.get("draft_vocab", {})
        rows = sampling.repeat(slots.shape[1])
        sample = sample_hidden(
            hidden.reshape(-1, hidden.shape[-1]),
            vocab.get("lm_head", lm_head(params["target"])),
            seed=rows.seed,
            position=(position[:, None] + jnp.arange(slots.shape[1])).reshape(-1),
            temperature=rows.temperature if self.coupled else jnp.zeros_like(rows.temperature),
            token_ids=vocab.get("token_ids"),
        )
        return sample.token.reshape(slots.shape[:2])
