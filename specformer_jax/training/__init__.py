"""Training a draft head: configuration, data, one step, the loop, checkpoints and evaluation."""
