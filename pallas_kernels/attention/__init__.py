"""Mixed-mask attention: a ragged causal context and a bidirectional draft block in one softmax."""
