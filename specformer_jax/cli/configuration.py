"""The flags that name an experiment: its configuration file and changes to it."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config` and `--set`, for `training.config.load_config`."""
    parser.add_argument("--config", required=True, help="a file of configs/ with get_config()")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="draft.ffn=768, say")
