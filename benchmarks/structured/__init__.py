"""Structured output measured: `python -m benchmarks.structured`."""
