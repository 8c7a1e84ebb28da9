"""`train.py export`: a run's head as a directory that `--draft` takes."""

from __future__ import annotations

import argparse

from specformer_jax.errors import require
from specformer_jax.training.export import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train.py export`."""
    parser.add_argument("--run", required=True, dest="folder")
    parser.add_argument("--out", required=True)
    parser.add_argument("--step", type=int)
    parser.add_argument("--target-name")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Runs the verb; user mistakes raise `UserError`."""
    require((options.step is None or options.step >= 1, f"--step {options.step} must be at least 1"))
    step = export(options.folder, options.out, target_name=options.target_name, step=options.step)
    print(f"wrote the head of step {step} to {options.out}")
