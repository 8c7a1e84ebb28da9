"""`train.py distill`: the target answers prompts, to train on."""

from __future__ import annotations

import argparse

import jax

from specformer_jax.cli import configuration, distributed
from specformer_jax.loading.language_model import load
from specformer_jax.nn.mesh import make_mesh
from specformer_jax.training.config import load_config
from specformer_jax.training.distillation import distill

PATIENCE = 7 * 24 * 3600  # hosts end when their own shards are done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train.py distill`."""
    configuration.add_arguments(parser)
    distributed.add_arguments(parser)
    parser.add_argument("--prompts", required=True, help="JSONL (prompt, turns or messages), or Hub dataset:split")
    parser.add_argument("--out", required=True, help="directory of the shards; finished ones are not made again")
    parser.add_argument("--draft", default="auto", help="head that speeds the answers up: auto, none or a directory")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Runs the verb; user mistakes raise `UserError`."""
    distributed.join(options.distributed, PATIENCE)
    config = load_config(options.config, options.set)
    prompts = distill.read_prompts(options.prompts)
    mesh = make_mesh(*config.distill.mesh, devices=jax.local_devices())
    lm = load(config.target, draft=options.draft, dtype=config.dtype, mesh=mesh)
    written = distill.distill(
        lm,
        prompts,
        config.distill,
        options.out,
        mesh=mesh,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    print(f"wrote {written} answer tokens to {options.out}")
