"""A target and its drafter as one static value; the arrays live in a `Params` tree beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from specformer_jax.decoding.sampling import RowSampling
from specformer_jax.drafters.base import Drafter
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn.sharded_kernels import sample_hidden
from specformer_jax.nn.target import Target, TargetOutput, lm_head

Params = dict[str, Any]
Cache = tuple[Any, ...]  # L layers of keys and values, and last what the drafter keeps


@dataclasses.dataclass(frozen=True)
class Model:
    """What is static of a target and its drafter: hashable, so that `jax.jit` takes it as a static argument.

    The methods are pure functions of a `Params` tree:

        {"target": ..., "draft": ..., "draft_vocab": {"token_ids": i32[V'], "lm_head": f[V', D]}}

    "draft" is there for a drafter with parameters, "draft_vocab" for one with a pruned draft vocabulary.

    Attributes:
      target: the decoder.
      drafter: what proposes drafts, or None for plain decoding.
      truncation: compile top-k, top-p and min-p in; without them no [B, W, V] array exists on an accelerator.
      coupled: drafts are chosen with the noise that the target will use, so that they agree more often when
        sampling; False takes their argmax. Neither changes the output.
    """

    target: Target
    drafter: Drafter | None = None
    truncation: bool = True
    coupled: bool = True

    @property
    def max_draft_length(self) -> int:
        """J, or 0 without a drafter."""
        return 0 if self.drafter is None else self.drafter.config.max_draft_length

    def create_cache(self, rows: int, positions: int) -> Cache:
        """L empty layers, and what the drafter keeps: for the SpecFormer head one layer more."""
        cache = cache_lib.create(self.target.config, self.target.config.layers, rows, positions, self.target.dtype)
        return cache if self.drafter is None else (*cache, self.drafter.memory(rows, positions))

    def read(
        self, params: Params, tokens: Int32[Array, "B W"], start: Int32[Array, " B"], cache: Cache
    ) -> TargetOutput:
        """The target's pass over a window at the positions from `start` on; a negative start marks an empty row."""
        layers = self.target.config.layers
        out = self.target.apply({"params": params["target"]}, tokens, start, cache[:layers])
        return out._replace(cache=out.cache + cache[layers:])

    def observe(
        self,
        params: Params,
        hooks: Float[Array, "B W G D"],
        tokens: Int32[Array, "B W"],
        next_tokens: Int32[Array, "B W"],
        start: Int32[Array, " B"],
        cache: Cache,
    ) -> tuple[Float[Array, "B W _"], Cache]:
        """The drafter's reading of a window, its memory at the cache's end written.

        Args:
          params: see the class.
          hooks: what `read` returned.
          tokens: the window.
          next_tokens: the token after each window index.
          start: as in `read`.
          cache: the last entry alone is read; None in its place stands for a full sequence.

        Returns:
          The drafter's context, and the cache.
        """
        assert self.drafter is not None
        context, memory = self.drafter.apply(
            {"params": params.get("draft", {})},
            hooks,
            tokens,
            next_tokens,
            start,
            cache[-1],
            self._embed(params),
            method="observe",
        )
        return context, (*cache[:-1], memory)

    def draft(
        self,
        params: Params,
        context: Float[Array, "B T _"],
        cache: Cache,
        start: Int32[Array, " B"],
        token: Int32[Array, "B T"],
        sampling: RowSampling,
        count: int,
    ) -> Int32[Array, "B T {count}"]:
        """The chain at some anchors of each row.

        Args:
          params: see the class.
          context: what `observe` gave at the anchors.
          cache: what `observe` returned.
          start: the absolute position of anchor 0; negative marks an empty row.
          token: the token after each anchor.
          sampling: how each row is sampled.
          count: static, k.

        Returns:
          The drafts of each anchor; -1 is no draft.
        """
        assert self.drafter is not None

        def pick(slots: Array, first: int) -> Array:
            anchors = start[:, None, None] + jnp.arange(slots.shape[1])[:, None]
            return self._pick(params, slots, anchors + 2 + first + jnp.arange(slots.shape[2]), sampling)

        return self.drafter.apply(
            {"params": params.get("draft", {})},
            context,
            cache[-1],
            start,
            token,
            count,
            self._embed(params),
            pick,
            method="draft",
        )

    def _embed(self, params: Params) -> Callable[[Array], Array]:
        return lambda tokens: self.target.apply({"params": params["target"]}, tokens, method="embed")

    def _pick(
        self,
        params: Params,
        slots: Float[Array, "B T n D"],
        position: Int32[Array, "B T n"],
        sampling: RowSampling,
    ) -> Int32[Array, "B T n"]:
        """The draft's token of each slot, which forecasts the token at `position`."""
        hidden = self.target.apply({"params": params["target"]}, slots, method="norm")
        vocab = params.get("draft_vocab", {})
        rows = sampling.repeat(position.size // position.shape[0])
        sample = sample_hidden(
            hidden.reshape(-1, hidden.shape[-1]),
            vocab.get("lm_head", lm_head(params["target"])),
            seed=rows.seed,
            position=position.reshape(-1),
            temperature=rows.temperature if self.coupled else jnp.zeros_like(rows.temperature),
            token_ids=vocab.get("token_ids"),
        )
        return sample.token.reshape(position.shape)
