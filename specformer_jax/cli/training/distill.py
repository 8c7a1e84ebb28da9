"""`train.py distill`: the target answers prompts, to train on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax

from specformer_jax.batch import omissions
from specformer_jax.batch.conversations import Conversation, read_conversations
from specformer_jax.batch.omissions import Omission
from specformer_jax.cli import command_line, dialogues
from specformer_jax.cli.training import distributed
from specformer_jax.errors import require
from specformer_jax.loading import weights
from specformer_jax.loading.language_model import load
from specformer_jax.loading.target_config import read_config
from specformer_jax.loading.tokenizer import load_tokenizer
from specformer_jax.nn.mesh import make_mesh
from specformer_jax.training.config import TrainConfig, load_config
from specformer_jax.training.data.documents import LEFT_OUT
from specformer_jax.training.distillation import distill, kept_answers

PATIENCE = 7 * 24 * 3600  # hosts end when their own shards are done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train.py distill`."""
    command_line.add_config_arguments(parser)
    distributed.add_arguments(parser)
    parser.add_argument("--prompts", required=True, metavar="SOURCE", help=dialogues.SOURCE)
    parser.add_argument("--out", required=True, help="directory of the shards; finished ones are not made again")
    parser.add_argument("--draft", default="auto", help="head that speeds the answers up: auto, none or a directory")
    dialogues.add_arguments(parser)
    dialogues.add_turns_argument(parser)
    parser.add_argument(
        "--samples", type=int, metavar="N", help="answers to each dialogue, for distill.samples of the configuration"
    )
    parser.add_argument(
        "--answers",
        choices=("target", "keep"),
        default="target",
        help="who answers: the target, or nobody: those that stand in the rows as text are kept",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Runs the verb; user mistakes raise `UserError`."""
    distributed.join(options.distributed, PATIENCE)  # first, so that whoever fails can tell the others
    dialogues.check(options)
    asked = [] if options.samples is None else [f"distill.samples={options.samples}"]
    config = load_config(options.config, [*options.set, *asked])
    require(
        (options.answers == "target" or config.distill.samples == 1, "--answers keep has one answer each: no samples")
    )
    found, left_out = read_conversations(options.prompts, options.system)
    conversations, not_asked = dialogues.chosen_turns(found, options.turns)
    if jax.process_index():
        left_out, not_asked = [], []  # the first process lists them
    written, not_answered = (_keep if options.answers == "keep" else _answer)(config, conversations, options)
    left_out += [*not_asked, *not_answered]
    omissions.write(Path(options.out) / f"{LEFT_OUT}-{jax.process_index():05d}.jsonl", left_out)
    turns = sum(len(c.turns) for c in conversations)
    there = sum(answer is not None for c in conversations for answer in c.answers)
    several = f", {config.distill.samples} answers each" if config.distill.samples > 1 else ""
    replaced = f", {there:,} answers of others in it" if there and options.answers == "target" else ""
    print(
        f"{len(conversations):,} dialogues, {turns:,} turns{several}{replaced}", *omissions.summary(left_out), sep="\n"
    )
    print(f"wrote {written} answer tokens to {options.out}")


def _answer(
    config: TrainConfig, conversations: Sequence[Conversation], options: argparse.Namespace
) -> tuple[int, list[Omission]]:
    """The target answers."""
    mesh = make_mesh(*config.distill.mesh, devices=jax.local_devices())
    return distill.distill(
        load(config.target, draft=options.draft, dtype=config.dtype, mesh=mesh),
        conversations,
        config.distill,
        options.out,
        raw=options.raw,
        mesh=mesh,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        programs=command_line.programs_folder(),
    )


def _keep(
    config: TrainConfig, conversations: Sequence[Conversation], options: argparse.Namespace
) -> tuple[int, list[Omission]]:
    """The answers are there: of the target only the tokenizer is needed."""
    path = weights.resolve(config.target)
    return kept_answers.keep(
        config.target,
        load_tokenizer(path, read_config(path)),
        conversations,
        config.distill.shard_size,
        options.out,
        raw=options.raw,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
