"""Kernel bodies for TPU (Mosaic)."""
