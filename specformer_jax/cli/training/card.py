"""`train.py card`: a model card beside a head, from the files of its run."""

from __future__ import annotations

import argparse

from specformer_jax.training.report import model_card


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train.py card`."""
    parser.add_argument("--run", required=True, dest="folder", help="the run that the head is of")
    parser.add_argument("--head", required=True, help="what `export` wrote; the card is its README.md")
    parser.add_argument("--evaluation", metavar="FILE", help="what `evaluate --json` wrote of this head")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Runs the verb; user mistakes raise `UserError`."""
    print(f"wrote {model_card.write(options.folder, options.head, options.evaluation)}")
