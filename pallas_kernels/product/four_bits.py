"""Weights in four bits, the blocks of a GGUF file's Q4_0 and Q4_1, in the order in which the native product reads them.

A weight is q * scale + least of its block, rounded to bfloat16: what dequantising and casting makes of it, bit for bit.
The product of a float16 and four bits is exact in float32, so the sum is the one that rounds, fused or not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import BFloat16, UInt8

Array = jax.Array

INPUTS = 32  # of a block
# Input j of a block is the low bits of byte j, or for j from 16 on the high bits of byte j - 16.
BLOCK = np.dtype([("scale", "<f2"), ("least", "<f2"), ("q", "u1", INPUTS // 2)])


def panels_of(blocks: np.ndarray, width: int) -> UInt8[np.ndarray, "panels blocks bytes"]:
    """The records of `pallas_kernels/cpu/product/product.h`.

    Args:
      blocks: BLOCK[inputs / 32, columns].
      width: the columns of a panel, 16; those that are not there are zeros.
    """
    rows, columns = blocks.shape
    padded = np.zeros((rows, -(-columns // width) * width), BLOCK)
    padded[:, :columns] = blocks
    by_panel = padded.reshape(rows, -1, width).swapaxes(0, 1)
    fields = [np.ascontiguousarray(by_panel[name]).view(np.uint8) for name in ("scale", "least")]
    for half in (0, 1):  # the low and the high bits of a block's bytes are its first and its last inputs
        q = (by_panel["q"] >> 4 * half & 15).reshape(*by_panel.shape, 4, 2, 2)
        words = q[..., 0, :] | q[..., 1, :] << 4  # [.., byte of the word, input of the pair]
        fields.append(words.swapaxes(-1, -2).reshape(*by_panel.shape[:2], -1))
    return np.concatenate(fields, axis=-1)


def expanded(panels: UInt8[Array, "panels blocks bytes"], width: int) -> BFloat16[Array, "inputs columns"]:
    """The weights of the records, the columns of the last panel that are not there among them."""
    ends = panels[..., : 4 * width].reshape(*panels.shape[:2], 2, width, 2)
    ends = jax.lax.bitcast_convert_type(ends, jnp.float16).astype(jnp.float32)
    q = panels[..., 4 * width :].reshape(*panels.shape[:2], 2, width, 2, 4)  # [.., half, column, input of a pair, byte]
    q = jnp.stack([q & 15, q >> 4], axis=-1).astype(jnp.float32)
    scale, least = (ends[:, :, i, None, :, None, None, None] for i in (0, 1))
    weights = (q * scale + least).astype(jnp.bfloat16)
    return weights.transpose(1, 2, 5, 6, 4, 0, 3).reshape(panels.shape[1] * INPUTS, panels.shape[0] * width)
