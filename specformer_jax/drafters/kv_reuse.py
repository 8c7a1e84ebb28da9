"""KV reuse (KVShot, Liu et al., arXiv 2604.26412): a draft block that reads the target's own keys and values.

A hidden state is what one query made of the context, for the sake of the next token; the cache still holds all of it.
So each draft layer attends to the cached keys and values of one of the target's layers, with queries of the target's
head geometry that stand at the target's rotary positions, as the keys do. The paper compares three forms:

    hidden   the context's keys and values are made of hidden states, as `DFlash` makes them
    kv       they are the target's own, and no hidden state is read
    hybrid   both

It trains them step by step, finds that the draft's own keys and values then learn from few gradients, and asks for
training by blocks: here the block is filled in at once, as DFlash does.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from specformer_jax.drafters.dflash import DFlash, DFlashLayer, HeadProduct


class KVReuse(DFlash):
    """`DFlash` with another context, by `config.reuse`; it keeps only the keys and values that it makes itself."""

    @property
    def _layer(self):
        return GatedLayer if self.config.reuse == "hybrid" else DFlashLayer

    def memory(self, pages):
        return () if self.config.reuse == "kv" else super().memory(pages)

    def view(self, memory, target_kv):
        """The context of each draft layer; in the hybrid form there are two, its own and the target's."""
        if self.config.reuse == "hidden":
            return memory
        cached = tuple(target_kv[layer] for layer in self.config.kv_layers)
        return cached if self.config.reuse == "kv" else tuple(zip(memory, cached, strict=True))

    def context(self, hooks, next_embedding, memory=None, places=None, segments=None):
        """Nothing, where the target has written all that is read; else as in `DFlash`."""
        if self.config.reuse == "kv":
            return jnp.zeros((*hooks.shape[:-2], 0), self.dtype), ()
        return super().context(hooks, next_embedding, memory, places, segments)


class GatedLayer(DFlashLayer):
    """The same queries attend to either context, each beside the block; a gate for each head weighs what they see."""

    def setup(self):
        super().setup()
        c = self.config
        self.gate = HeadProduct(c.kv_heads, c.heads // c.kv_heads, 1)

    def read(self, y, context, attend):
        own, cached = (attend(kv) for kv in context)
        share = nn.sigmoid(self.gate(y)).reshape(*own.shape[:-1], 1)
        return share * own + (1 - share) * cached
