"""`train.py all`: distill, fit, export, evaluate and card as one command, which goes on where it was stopped."""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import jax

from specformer_jax import files
from specformer_jax.batch.conversations import Conversation, read_conversations
from specformer_jax.cli import command_line, dialogues
from specformer_jax.cli.training import card, distill, distributed, evaluate, export, fit
from specformer_jax.errors import UserError, require
from specformer_jax.loading import head_checkpoint
from specformer_jax.training.config import load_config
from specformer_jax.training.fit import check_fits
from specformer_jax.training.report import model_card

HELD_OUT, MOST = 8, 64  # every eighth dialogue is held out, so many at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train.py all`."""
    command_line.add_config_arguments(parser)
    distributed.add_arguments(parser)
    parser.add_argument("--prompts", required=True, metavar="SOURCE", help=dialogues.SOURCE)
    parser.add_argument(
        "--eval-prompts",
        metavar="SOURCE",
        help=f"dialogues to judge the head by; without, every {HELD_OUT}th of --prompts is held out, {MOST} at most",
    )
    parser.add_argument(
        "--out", required=True, help="folder of all that is made: answers/, run/, head/, evaluation.json"
    )
    parser.add_argument("--draft", default="auto", help="head that speeds the answers up: auto, none or a directory")
    parser.add_argument(
        "--offline", action="store_true", help="store the target's hooks in the folder, and train from them"
    )
    dialogues.add_arguments(parser)
    dialogues.add_turns_argument(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Runs the verbs; user mistakes raise `UserError`, a stopped run `StopAsked`."""
    distributed.join(options.distributed, distill.PATIENCE)  # first, so that whoever fails can tell the others
    dialogues.check(options)
    config, out = load_config(options.config, options.set), Path(options.out)
    check_fits(config, options.offline)
    training, held_out = _conversations(options)
    settings = ["--config", options.config, *(part for text in options.set for part in ("--set", text))]
    asking = ["--turns", options.turns, *(["--raw"] if options.raw else [])]
    asked, judged = out / "prompts.jsonl", out / "held_out.jsonl"
    if jax.process_index() == 0:
        _write(asked, training)
        _write(judged, held_out)
    distributed.meet("the prompts are written", distributed.PATIENCE)

    answers = ["--draft", options.draft, *asking]
    _verb(options, distill, *settings, "--prompts", asked, "--out", out / "answers", *answers)
    greedy = [*settings, "--set", "distill.temperatures=0"]
    _verb(options, distill, *greedy, "--prompts", judged, "--out", out / "held_out", *answers)
    distributed.meet("all is answered", distill.PATIENCE)
    hooks = ["--offline", out / "hooks"] if options.offline else []
    _verb(
        options,
        fit,
        *settings,
        "--data",
        out / "answers",
        "--run",
        out / "run",
        "--eval-prompts",
        out / "held_out",
        *hooks,
    )
    with tempfile.TemporaryDirectory() as elsewhere:  # all read the checkpoint together, the first one writes the head
        head = elsewhere if jax.process_index() else out / "head"
        _verb(options, export, "--run", out / "run", "--out", head, "--best")
    if jax.process_index() == 0:
        report = out / "evaluation.json"
        if not _evaluated(out / "head", report):
            model = ["--target", config.target, "--dtype", config.dtype, "--draft", out / "head"]
            length = ["--max-new-tokens", config.distill.max_new_tokens]
            _verb(options, evaluate, *model, *length, "--prompts", judged, *asking, "--json", report, "--record")
        _verb(options, card, "--run", out / "run", "--head", out / "head", "--evaluation", report)
    distributed.meet("the card is written", distill.PATIENCE)


def _conversations(options: argparse.Namespace) -> tuple[list[Conversation], list[Conversation]]:
    """What is trained on, and what the head is judged by."""
    found, _ = read_conversations(options.prompts, options.system)
    if options.eval_prompts is not None:
        return found, read_conversations(options.eval_prompts, options.system)[0]
    held_out = found[HELD_OUT - 1 :: HELD_OUT][:MOST] or found[1:][-1:]
    require(
        (bool(held_out), f"{options.prompts} holds one dialogue, so none can be held out: give more or --eval-prompts")
    )
    ids = {c.id for c in held_out}
    return [c for c in found if c.id not in ids], held_out


def _write(path: Path, conversations: Iterable[Conversation]) -> None:
    """Dialogues as a file that the verbs read, the same for the same dialogues."""
    rows = []
    for c in conversations:
        messages = [] if c.system is None else [{"role": "system", "content": c.system}]
        for text, answer in zip(c.turns, c.answers or [None] * len(c.turns), strict=True):
            messages.append({"role": "user", "content": text})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        rows.append(json.dumps({"id": c.id, "messages": messages}, ensure_ascii=False) + "\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, "".join(rows))
    except OSError as error:
        raise UserError(f"the prompts cannot be written to {path}: {error}") from error


def _verb(options: argparse.Namespace, verb: ModuleType, *arguments: object) -> None:
    """Runs a verb as its own command line would."""
    name, words = verb.__name__.rpartition(".")[2], [str(argument) for argument in arguments]
    print(f"\n== train.py {name} {shlex.join(words)}", flush=True)
    parser = argparse.ArgumentParser(prog=f"train.py {name}")
    verb.add_arguments(parser)
    chosen = parser.parse_args(words, argparse.Namespace(stop=options.stop))
    chosen.run(chosen)


def _evaluated(head: Path, report: Path) -> bool:
    """Whether this head is evaluated already; what was counted is recorded in it again, as it was exported anew."""
    try:
        counted = model_card.read_evaluation(report, head_checkpoint.read_config(head))
    except UserError:
        return False
    (counts,) = counted["files"].values()
    head_checkpoint.record_acceptance(head, counts["offline"][-1]["acceptance"])
    return True
