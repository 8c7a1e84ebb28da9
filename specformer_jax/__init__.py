"""SpecFormer in JAX: lossless speculative decoding that still pays at large batch."""

from specformer_jax.config import DraftConfig, SamplingParams, Shape, TargetConfig, UserError
from specformer_jax.generation import Answer, generate
from specformer_jax.loading import LanguageModel, load
from specformer_jax.version import __version__

__all__ = [
    "Answer",
    "DraftConfig",
    "LanguageModel",
    "SamplingParams",
    "Shape",
    "TargetConfig",
    "UserError",
    "__version__",
    "generate",
    "load",
]
