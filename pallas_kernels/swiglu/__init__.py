"""The gate of an FFN: silu(gate) * up."""
