"""SpecFormer in JAX: lossless speculative decoding that still pays at large batch."""

from specformer_jax.config import DraftConfig, SamplingParams, Shape, TargetConfig, UserError
from specformer_jax.generation import Answer, generate
from specformer_jax.loading import LanguageModel, load

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "DraftConfig",
    "LanguageModel",
    "SamplingParams",
    "Shape",
    "TargetConfig",
    "UserError",
    "generate",
    "load",
]
