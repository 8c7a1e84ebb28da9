"""Train a draft head: `train.py all`, or `distill`, `fit`, `export`, `evaluate` and `card` one by one.

    python train.py all --config configs/smollm2_135m.py --prompts prompts.jsonl --out runs/a

is, with some of the prompts held out,

    python train.py distill --config configs/smollm2_135m.py --prompts prompts.jsonl --out answers/
    python train.py fit --config configs/smollm2_135m.py --data answers/ --run runs/a --offline hooks/
    python train.py export --run runs/a --out runs/a/head
    python train.py evaluate --draft runs/a/head --prompts questions.jsonl --record

Launching (mesh is data,fsdp,model; over several hosts it names every device, distill.mesh those of one host):

    one CPU                        JAX_PLATFORMS=cpu python train.py fit ...
    one host with 8 GPUs           python train.py fit ... --set mesh=8,1,1
                                   python train.py distill ... --set distill.mesh=1,1,8
    TPU pod slice, on every host   python train.py fit ... --set mesh=8,4,8 --distributed auto
                                   python train.py distill ... --set distill.mesh=1,1,4 --distributed auto

Elsewhere give each of N processes `--distributed HOST:PORT,N,INDEX`, or that value in SPECFORMER_DISTRIBUTED.
SIGTERM and Ctrl-C save a checkpoint and exit with 143 and 130, a second one ends at once; the same command goes on from
the newest checkpoint. A finished command exits with 0, a mistake with 2, one that another host's end has ended with 3.
"""

from __future__ import annotations

import argparse
import logging
import sys

from specformer_jax.cli import command_line
from specformer_jax.cli.training import all_verbs, card, distill, distributed, evaluate, export, fit
from specformer_jax.training.run import stop_signals


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb of `train.py`; returns its exit code, with which one of several processes ends instead."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    distill.add_arguments(verbs.add_parser("distill", help="let the target answer prompts, to train on"))
    fit.add_arguments(verbs.add_parser("fit", help="train a head, or go on training it"))
    evaluate.add_arguments(verbs.add_parser("evaluate", help="kappa, acceptance by position and tokens by step"))
    export.add_arguments(verbs.add_parser("export", help="one safetensors file and its config, of a run's checkpoint"))
    card.add_arguments(verbs.add_parser("card", help="a model card of a head, from the files of its run"))
    all_verbs.add_arguments(verbs.add_parser("all", help="all of these: from prompts to a head with its card"))
    options = command_line.parse(parser, arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    with stop_signals.listening() as options.stop:
        try:
            code = command_line.run_command(lambda: distributed.together(lambda: options.run(options)))
        except stop_signals.StopAsked as stopped:
            where = str(stopped) or "where nothing was unsaved"
            print(f"stopped by {options.stop.received.name} {where}: the same command goes on", file=sys.stderr)
            code = 128 + options.stop.received
    distributed.end(code)
    return code
