"""Grammars that an answer has to follow: which tokens they allow after each token of a chain of drafts."""
