"""Grouped RMS norm fused with the downsampling product: how SpecFormer's head reads the target's hooks."""
