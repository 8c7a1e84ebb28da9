"""Continuous batching: requests of any thread answered by one thread that owns the device."""

from specformer_jax.engine.active_request import Handle
from specformer_jax.engine.config import EngineConfig, EngineStats
from specformer_jax.engine.engine import Engine
from specformer_jax.engine.request import Request

__all__ = ["Engine", "EngineConfig", "EngineStats", "Handle", "Request"]
