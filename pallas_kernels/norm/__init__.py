"""RMS norm, and the grouped one fused with the downsampling product: how SpecFormer's head reads the target's hooks."""
