"""From names on a command line to a model that decodes: weights, tokenizers, draft heads."""
