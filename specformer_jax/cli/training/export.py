"""`train.py export`: a run's head as a directory that `--draft` takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from specformer_jax.errors import require
from specformer_jax.training.export import export
from specformer_jax.training.run import checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train.py export`."""
    parser.add_argument("--run", required=True, dest="folder")
    parser.add_argument("--out", required=True)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="of this checkpoint, not of the newest")
    which.add_argument(
        "--best",
        action="store_true",
        help="of the checkpoint with the highest kappa: the held-out one, where there is one",
    )
    parser.add_argument("--target-name")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Runs the verb; user mistakes raise `UserError`."""
    require((options.step is None or options.step >= 1, f"--step {options.step} must be at least 1"))
    step, told = options.step, ""
    if options.best:
        step, kappa, held_out = checkpoint.best(Path(options.folder) / "checkpoints")
        told = (
            f", the best of those that are kept: kappa {kappa:.3f} on {'held-out' if held_out else 'training'} answers"
        )
    step = export(options.folder, options.out, target_name=options.target_name, step=step)
    print(f"wrote the head of step {step} to {options.out}{told}")
