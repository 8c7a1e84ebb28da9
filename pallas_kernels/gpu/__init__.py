"""Kernel bodies for CUDA; `lowering` is the one file that knows which compiler they go through."""
