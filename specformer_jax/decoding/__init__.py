"""Speculative decoding as pure functions over a `DecodeState`: what composes under `jax.jit`."""
