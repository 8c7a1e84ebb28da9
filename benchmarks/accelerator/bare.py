"""Stands in for two packages that an image with JAX need not have, as far as this command reads them.

jaxtyping describes shapes that only the tests check. Of gguf's many kinds of blocks the built-in weights have two.
Where the packages are installed they are taken.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
import types

import numpy as np


def stand_in() -> None:
    """Puts modules in the place of those that are not installed."""
    for name, make in (("jaxtyping", _jaxtyping), ("gguf", _gguf)):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules |= {module.__name__: module for module in make()}


class Annotation:
    """`Float[Array, "B T"]` is the array's own type."""

    def __getitem__(self, item):
        return item[0]


class Annotations(types.ModuleType):
    """jaxtyping, whatever is asked of it."""

    def __getattr__(self, name):
        return Annotation()


def _jaxtyping() -> list[types.ModuleType]:
    import jax

    module = Annotations("jaxtyping")
    module.Array = jax.Array
    return [module]


class TensorType(enum.IntEnum):
    """How the tensors of a GGUF file may be stored here."""

    F32 = 0
    F16 = 1
    Q4_1 = 3
    Q8_0 = 8


class ValueType(enum.IntEnum):
    """Kinds of metadata in a GGUF file."""

    UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)


BLOCK = 32  # weights of a quantised block
_BLOCK_BYTES = {TensorType.Q4_1: 20, TensorType.Q8_0: 34}


def byte_shape(shape: tuple[int, ...], kind: TensorType) -> tuple[int, ...]:
    """The bytes that the rows of a quantised tensor take."""
    return (*shape[:-1], shape[-1] // BLOCK * _BLOCK_BYTES[kind])


def dequantize(data: np.ndarray, kind: TensorType) -> np.ndarray:
    """The values of a stored tensor, f32[rows, ...]."""
    if kind not in _BLOCK_BYTES:
        return data.astype(np.float32)
    blocks = data.reshape(-1, _BLOCK_BYTES[kind])
    scale = blocks[:, :2].view(np.float16).astype(np.float32)
    if kind == TensorType.Q8_0:
        values = scale * blocks[:, 2:].view(np.int8)
    else:  # the least value, then sixteen low halves of bytes before sixteen high ones
        least, halves = blocks[:, 2:4].view(np.float16).astype(np.float32), blocks[:, 4:]
        values = scale * np.concatenate([halves & 15, halves >> 4], axis=1) + least
    return values.reshape(*data.shape[:-1], -1)


def _gguf() -> list[types.ModuleType]:
    module, quants = types.ModuleType("gguf"), types.ModuleType("gguf.quants")
    module.quants, quants.quant_shape_to_byte_shape = quants, byte_shape
    module.GGMLQuantizationType, module.GGUFValueType = TensorType, ValueType
    module.GGUF_DEFAULT_ALIGNMENT, module.dequantize = 32, dequantize
    return [module, quants]
