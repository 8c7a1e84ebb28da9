"""Continuous batching: requests of any thread answered by one thread that owns the device."""

from specformer_jax.engine.active_request import Handle
from specformer_jax.engine.answer_file import answer_prompt_file
from specformer_jax.engine.config import EngineConfig
from specformer_jax.engine.engine import Engine
from specformer_jax.engine.request import Request
from specformer_jax.engine.stats import EngineStats

__all__ = ["Engine", "EngineConfig", "EngineStats", "Handle", "Request", "answer_prompt_file"]
