"""Sampling with position-keyed noise, from logits or fused with the LM head, and the acceptance of drafts."""
