"""SpecFormer in JAX: lossless speculative decoding that still pays at large batch."""

from specformer_jax.batch.generation import Answer, generate
from specformer_jax.config import DraftConfig, SamplingParams, Shape, TargetConfig
from specformer_jax.decoding import decode, sampling
from specformer_jax.decoding.verification.kind import Verification
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel, load
from specformer_jax.version import __version__

__all__ = [
    "Answer",
    "DraftConfig",
    "LanguageModel",
    "SamplingParams",
    "Shape",
    "TargetConfig",
    "UserError",
    "Verification",
    "__version__",
    "decode",
    "generate",
    "load",
    "sampling",
]
