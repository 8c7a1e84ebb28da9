"""A target and its drafter as one static value; the arrays live in a `Params` tree beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import Places, lm_head_logits
from specformer_jax.decoding.sampling import RowSampling, distribution
from specformer_jax.decoding.verification import noise
from specformer_jax.decoding.verification.kind import Verification
from specformer_jax.drafters.base import Chain, Drafter
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn.sharded_kernels import sample_hidden, sample_logits
from specformer_jax.nn.target import Target, TargetOutput, lm_head, look_up

Params = dict[str, Any]
Cache = tuple[Any, ...]  # L layers of keys and values, and last what the drafter keeps


@dataclasses.dataclass(frozen=True)
class Model:
    """What is static of a target and its drafter: hashable, so that `jax.jit` takes it as a static argument.

    The methods are pure functions of a `Params` tree:

        {"target": ..., "draft": ..., "draft_vocab": {"token_ids": i32[V'], "lm_head": f[V', D], "embedding": f[V, D]}}

    "draft" is there for a drafter with parameters, "draft_vocab" for one with a pruned draft vocabulary, an LM head or
    an embedding of its own; in it is what differs from the target's.

    Attributes:
      target: the decoder.
      drafter: what proposes drafts, or None for plain decoding.
      truncation: compile top-k, top-p and min-p in; without them, processors and masks, exact verification holds no
        array of logits on an accelerator.
      coupled: drafts are chosen with the noise that the target will use, so that they agree more often when
        sampling; False takes their argmax. Neither changes the output.
      verification: how drafts are verified; where it draws them they have noise of their own.
    """

    target: Target
    drafter: Drafter | None = None
    truncation: bool = True
    coupled: bool = True
    verification: Verification = Verification()

    @property
    def max_draft_length(self) -> int:
        """J, or 0 without a drafter."""
        return 0 if self.drafter is None else self.drafter.config.max_draft_length

    @property
    def draws(self) -> bool:
        """Whether drafts are drawn, and verified by what they were drawn from."""
        return self.drafter is not None and self.verification.draws

    def create_cache(self, pages: int) -> Cache:
        """L empty layers, and what the drafter keeps: for the SpecFormer head one layer more."""
        cache = cache_lib.create(self.target.config, self.target.config.layers, pages, self.target.dtype)
        return cache if self.drafter is None else (*cache, self.drafter.memory(pages))

    def read(self, params: Params, tokens: Int32[Array, " T"], places: Places, cache: Cache) -> TargetOutput:
        """The target's pass over a flat batch."""
        layers = self.target.config.layers
        out = self.target.apply({"params": params["target"]}, tokens, cache[:layers], places)
        return out._replace(cache=out.cache + cache[layers:])

    def observe(
        self,
        params: Params,
        hooks: Float[Array, "*batch G D"],
        next_tokens: Int32[Array, "*batch"],
        places: Places | None,
        cache: Cache,
    ) -> tuple[Float[Array, "*batch _"], Cache]:
        """The drafter's reading of a flat batch or of whole sequences, its memory at the cache's end written.

        Args:
          params: see the class.
          hooks: what `read` returned.
          next_tokens: the token after each place.
          places: where the tokens of a flat batch stand; None for whole sequences.
          cache: the last entry alone is read; None in its place stands for whole sequences.

        Returns:
          The drafter's context, and the cache.
        """
        if self.drafter is None:
            return jnp.zeros((*next_tokens.shape, 0)), cache
        context, memory = self.drafter.apply(
            {"params": params.get("draft", {})},
            hooks,
            self._embed(params)(next_tokens),
            cache[-1],
            places,
            method="context",
        )
        return context, (*cache[:-1], memory)

    def draft(
        self,
        params: Params,
        context: Float[Array, "B A _"],
        cache: Cache,
        start: Int32[Array, " B"],
        token: Int32[Array, "B A"],
        history: Int32[Array, "B C"],
        sampling: RowSampling,
        count: int,
        table: Int32[Array, "B tables"] | None = None,
    ) -> Chain:
        """The chain at some anchors of each row.

        Args:
          params: see the class.
          context: what `observe` gave at the anchors.
          cache: what `observe` returned, of whole sequences with the target's keys and values of them.
          start: the absolute position of anchor 0; negative marks an empty row.
          token: the token after each anchor.
          history: the rows' tokens by position.
          sampling: how each row is sampled.
          count: static, k.
          table: the pages of each row; None for whole sequences.
        """
        assert self.drafter is not None

        def pick(slots: Array, first: int) -> Chain:
            anchors = start[:, None, None] + jnp.arange(slots.shape[1])[:, None]
            if self.draws:
                at = noise.slot_positions(anchors, first + jnp.arange(slots.shape[2]))
                return self._draw(params, slots, at, sampling)
            return self._pick(params, slots, anchors + 2 + first + jnp.arange(slots.shape[2]), sampling)

        def likeliest(states: Array, number: int) -> Array:
            hidden = self._norm(params, states).reshape(-1, states.shape[-1])
            logits = lm_head_logits(hidden, lm_head(params["target"]))
            best = jax.lax.top_k(logits, min(number, logits.shape[1]))[1]
            return best.reshape(*states.shape[:-1], -1)

        return self.drafter.apply(
            {"params": params.get("draft", {})},
            context,
            self.drafter.view(cache[-1], cache[:-1]),
            start,
            token,
            history,
            count,
            self._embed(params),
            pick,
            likeliest,
            table,
            self.draws,
            method="draft",
        )

    def _embed(self, params: Params) -> Callable[[Array], Array]:
        table = params.get("draft_vocab", {}).get("embedding", params["target"]["embedding"])
        return lambda tokens: look_up(table, tokens, self.target.dtype)

    def _norm(self, params: Params, states: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.target.apply({"params": params["target"]}, states, method="norm")

    def _pick(
        self,
        params: Params,
        slots: Float[Array, "B A n D"],
        position: Int32[Array, "B A n"],
        sampling: RowSampling,
    ) -> Chain:
        """The draft's token of each slot, which forecasts the token at `position`, and its confidence: [B, A, n]."""
        hidden, vocab = self._normed(params, slots), params.get("draft_vocab", {})
        rows = sampling.repeat(position.size // position.shape[0])
        sample = sample_hidden(
            hidden.reshape(-1, hidden.shape[-1]),
            vocab.get("lm_head", lm_head(params["target"])),
            seed=rows.seed,
            position=position.reshape(-1),
            temperature=rows.temperature if self.coupled else jnp.zeros_like(rows.temperature),
            token_ids=vocab.get("token_ids"),
            confidence=True,
        )
        assert sample.confidence is not None
        return Chain(sample.token.reshape(position.shape), sample.confidence.reshape(position.shape))

    def _draw(
        self, params: Params, slots: Float[Array, "B A n D"], at: Int32[Array, "B A n"], sampling: RowSampling
    ) -> Chain:
        """A token of each slot by noise of its own, at these positions of its stream, and what it was drawn from."""
        hidden, vocab = self._normed(params, slots), params.get("draft_vocab", {})
        rows = sampling.repeat(at.size // at.shape[0])
        logits = lm_head_logits(hidden.reshape(-1, hidden.shape[-1]), vocab.get("lm_head", lm_head(params["target"])))
        sample = sample_logits(
            logits,
            seed=noise.stream(rows.seed, noise.DRAFTS),
            position=at.reshape(-1),
            temperature=rows.temperature,
            confidence=True,
        )
        assert sample.confidence is not None
        tokens, drawn_from = sample.token, distribution(logits, rows.temperature)
        if "token_ids" in vocab:
            whole = jnp.zeros((len(logits), self.target.config.vocab_size), jnp.float32)
            tokens, drawn_from = vocab["token_ids"][tokens], whole.at[:, vocab["token_ids"]].set(drawn_from)
        chain = Chain(tokens, sample.confidence, drawn_from)
        return jax.tree.map(lambda x: x.reshape(*at.shape, *x.shape[1:]), chain)

    def _normed(self, params: Params, slots: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The slots as the draft's LM head reads them."""
        assert self.drafter is not None
        return slots if self.drafter.norms_slots else self._norm(params, slots)
