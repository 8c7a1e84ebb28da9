"""`train.py fit`: trains a head, or goes on training it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax

from specformer_jax.cli import command_line
from specformer_jax.cli.training import distributed, held_out_answers
from specformer_jax.config import TRAINED
from specformer_jax.errors import require
from specformer_jax.loading import weights
from specformer_jax.loading.language_model import load_target
from specformer_jax.loading.target_config import read_config
from specformer_jax.loading.tokenizer import load_tokenizer
from specformer_jax.nn.mesh import make_mesh
from specformer_jax.training import export, fit
from specformer_jax.training.config import load_config
from specformer_jax.training.data.sources import check_tokenizer, read_documents
from specformer_jax.training.held_out import HeldOut
from specformer_jax.training.report import boards, data_report, run_report, samples
from specformer_jax.training.run.start import Start
from specformer_jax.training.run.stop_signals import StopAsked
from specformer_jax.training.train_step import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train.py fit`."""
    command_line.add_config_arguments(parser)
    distributed.add_arguments(parser)
    parser.add_argument(
        "--data",
        required=True,
        help="shards of distill, a JSONL of prompt_ids and response_ids, TFDS, or a mixture.json",
    )
    parser.add_argument("--drafter", choices=TRAINED, help="train this one in the config's way")
    parser.add_argument("--run", required=True, dest="folder", help="directory of checkpoints and metrics")
    parser.add_argument("--offline", metavar="DIR", help="store the target's hooks there and train from them")
    parser.add_argument(
        "--stop-at", type=int, metavar="STEP", help="end after this step, with the schedule of all steps"
    )
    beginning = parser.add_mutually_exclusive_group()
    beginning.add_argument(
        "--fresh", action="store_true", help="begin a new run; what a run has left in the folder is moved aside"
    )
    beginning.add_argument("--must-resume", action="store_true", help="go on with a run, or end if there is none")
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="go on though this is another than the run was started with; may be repeated",
    )
    parser.add_argument(
        "--eval-prompts",
        metavar="SOURCE",
        help="judge the head along the target's answers to these dialogues, given first; or answers as --data has them",
    )
    parser.add_argument("--eval-every", type=int, metavar="STEPS", help="not at checkpoints alone, but every so often")
    parser.add_argument("--wandb", metavar="PROJECT", help="log to this project at Weights & Biases, too")
    parser.add_argument("--tfds", metavar="DIR", help="first write the data there as a TFDS dataset, and read that")
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what is trained on and what it takes, and show three samples"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Runs the verb; user mistakes raise `UserError`, a run that was told to stop `StopAsked`."""
    distributed.join(options.distributed)
    # What can be refused is refused before the documents and the target are read.
    start = Start(options.fresh, options.must_resume, tuple(options.allow_change))
    require(
        (options.stop_at is None or options.stop_at >= 1, f"--stop-at {options.stop_at} must be at least 1"),
        (
            Path(options.folder).resolve() != Path(options.data).resolve(),
            f"--run and --data are both {options.folder}: a run needs a folder of its own",
        ),
        (
            options.eval_every is None or (options.eval_prompts is not None and options.eval_every >= 1),
            f"--eval-every {options.eval_every} must be at least 1, and needs --eval-prompts",
        ),
    )
    boards.check_wandb(options.wandb)
    experiment = load_config(options.config, options.set, options.drafter)
    fit.check_fits(experiment, options.offline is not None)
    start.check(Path(options.folder))
    if jax.process_count() > 1:  # one process has a store of its own, which finds programs without tracing them
        command_line.keep_compiled_programs()
    path = weights.resolve(experiment.target)
    target = read_config(path)
    tokenizer = load_tokenizer(path, target)
    config = experiment.bind(target)
    documents = read_documents(options.data, target.vocab_size)
    check_tokenizer(options.data, tokenizer.fingerprint)
    if options.tfds and not options.dry_run:
        # TFDS takes seconds to import, so only who asks for it waits for it.
        from specformer_jax.training.data import tfds_files

        documents = read_documents(tfds_files.build(documents, options.tfds, tokenizer.fingerprint))
    mesh = make_mesh(*config.mesh)
    if options.dry_run:
        trainer = Trainer(target, config)
        packed = fit.pack(config, documents, mesh)
        token_ids = export.start_of(config, target, documents)[1]
        stored = options.offline is not None
        about = data_report.describe(trainer, documents, packed, token_ids, mesh.size, stored_hooks=stored)
        shown = samples.samples(packed[0], tokenizer, colours=sys.stdout.isatty())
        if jax.process_index() == 0:
            print(*about.lines(), *(f"\n{sample}" for sample in shown), sep="\n")
        return
    held_out = None
    if options.eval_prompts is not None:
        answers = held_out_answers.read(
            config, options.eval_prompts, Path(options.folder), tokenizer, target.vocab_size
        )
        held_out = HeldOut(answers, options.eval_every, tokenizer)
    params = load_target(path, target, config.dtype, mesh)
    inputs = fit.Inputs(target, params, documents, tokenizer.fingerprint)
    state = fit.fit(
        config,
        inputs,
        options.folder,
        offline=options.offline,
        mesh=mesh,
        stop_at=options.stop_at,
        start=start,
        stop=options.stop,
        held_out=held_out,
        programs=command_line.programs_folder(),
        wandb=options.wandb,
    )
    if jax.process_index() == 0:
        print(f"report: {run_report.write(options.folder)}")
    done = int(state.step)
    if options.stop.received and done < config.steps:
        raise StopAsked(f"after step {done} of {config.steps}, with a checkpoint of it")
    print(f"finished: step {done} of {config.steps}, in {options.folder}")
