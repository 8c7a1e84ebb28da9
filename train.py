"""Train a draft head: `train.py distill` makes answers, `fit` trains on them, then `export` and `evaluate` the head."""

from __future__ import annotations

import sys

from specformer_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
