"""Medusa heads (Cai et al., arXiv 2401.10774): each slot from the target's last hidden state alone.

Slot j is h + silu(W_j h + b_j) with h = rms(HS[L]). Beside an unnormed HS[L] what the block adds would hardly count,
and the target's final norm is blind to the difference. The original gives every slot an LM head of its own; here all
share the target's frozen one, as every drafter of this project does, so that they differ in how they forecast and not
in that.
"""

from __future__ import annotations

import flax.linen as nn

from pallas_kernels import matmul
from specformer_jax.drafters.base import Drafter
from specformer_jax.nn import layers


class Medusa(Drafter):
    """J residual blocks side by side, zero at the start: an untrained slot says what the target's last state says."""

    def setup(self):
        J, D = self.config.max_draft_length, self.target.width
        zeros = nn.initializers.zeros_init()
        self.norm = layers.RMSNorm(self.target.rms_epsilon)
        kernel_init = nn.with_logical_partitioning(zeros, ("embed", "slot", "embed_out"))
        self.kernel = self.param("kernel", kernel_init, (D, J, D))
        self.bias = self.param("bias", nn.with_logical_partitioning(zeros, ("slot", "embed_out")), (J, D))

    def memory(self, pages):
        """None: it remembers nothing."""
        return None

    def context(self, hooks, next_embedding, memory=None, places=None, segments=None):
        return hooks[..., -1, :].astype(self.dtype), None

    def forecast(self, context, memory, start, before, count, segments=None, table=None):
        hidden = self.norm(context)
        wide = matmul(hidden, self.kernel[:, :count]) + self.bias[:count].astype(context.dtype)
        return hidden[:, :, None] + nn.silu(wide)
