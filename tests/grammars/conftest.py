"""The engine of a tiny model, as that room's tests have it."""

from tests.engine.conftest import engine, lm

__all__ = ["engine", "lm"]
