"""EAGLE-3 heads as others publish them (Li et al., arXiv 2503.01840): `Eagle` with norms, sizes and an LM head its own.

What the published layouts differ in are switches, named as their config.json names them; 3.1 heads set the norms of the
hooks and `norm_output`.
"""

from __future__ import annotations

import dataclasses

from specformer_jax.config import TargetConfig
from specformer_jax.drafters.eagle import Eagle
from specformer_jax.drafters.fusion import Fusion
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn import layers


class Eagle3(Eagle):
    """A published head; the drafts are what the programs it was made for would draft as a chain.

    Attributes:
      decoder: the sizes and rotary positions of its layer, as wide as the target.
      hook_norm: what is normed before the hooks are fused, see `Fusion`.
      norm_before_residual: the residual of the attention is the normed hidden state.
      norm_output: the next step is fed the state after the final norm, which its slot is made of.
    """

    decoder: TargetConfig = dataclasses.field(kw_only=True)
    hook_norm: str = dataclasses.field(default="none", kw_only=True)
    norm_before_residual: bool = dataclasses.field(default=False, kw_only=True)
    norm_output: bool = dataclasses.field(default=False, kw_only=True)

    def setup(self):
        d = self.decoder
        self.fuse = Fusion(d.rms_epsilon, self.hook_norm)
        self.embedding_norm, self.hidden_norm, self.ffn_norm, self.final_norm = (
            layers.RMSNorm(d.rms_epsilon) for _ in range(4)
        )
        self.qkv = layers.QKV(d.heads, d.kv_heads, d.head_size, d.qkv_bias, d.rms_epsilon if d.qk_norm else None)
        self.out = layers.Output(d.width)
        self.ffn = layers.SwiGLU(d.ffn)

    @property
    def norms_slots(self):
        return True

    def memory(self, pages):
        return cache_lib.create(self.decoder, 1, pages, self.dtype)[0]

    def rotary(self, positions):
        """The rotary embedding of its own layer."""
        d = self.decoder
        return layers.rotary(positions, d.head_size, d.rope_theta, d.rope_scaling)

    def _rest(self, hidden, heads):
        if self.norm_before_residual:
            hidden = self.hidden_norm(hidden)
        state = super()._rest(hidden, heads)
        return self.final_norm(state) if self.norm_output else state

    def _slot(self, state):
        return state if self.norm_output else self.final_norm(state)
