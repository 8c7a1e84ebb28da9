"""What each part of the shipped head and of its training is worth: one row each, the same data, steps and seeds.

    python -m benchmarks.ablations --data answers/ --texts prompts.jsonl --json benchmarks/results/ablations.json

Each row is trained from its start by the `train.py fit` command that the report shows, and counts kappa at the shipped
J along greedy answers that no row was trained on. `paper` is the paper's head and objective, at that J and the shipped
draft vocabulary and with a learning rate for so few steps; the rows that begin with its name change one thing of it.
Those with a + add, one after the other, what the shipped configuration has beyond the paper, up to all of it; those
that begin with "shipped" change one thing of that, the texts or what a larger head has. `benchmarks.drafters` compares
with other drafters.

"Others' texts" keeps the prompts and puts as many tokens of --texts in the answers' place: texts that the target did
not write, several of them joined where an answer is long, so that documents, packing and token counts stay the same.

The hooks are read once for all rows that can share them. Every row is trained once with each seed, which decides its
first parameters and the order of its data. What is in --json already is not run again, so a run that was stopped goes
on with the same command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import drafters
from benchmarks.harness.console import say
from specformer_jax.batch import prompt_files
from specformer_jax.cli import command_line
from specformer_jax.errors import UserError
from specformer_jax.loading import weights
from specformer_jax.loading.language_model import load
from specformer_jax.loading.target_config import read_config
from specformer_jax.loading.tokenizer import load_tokenizer
from specformer_jax.training import evaluate, metrics
from specformer_jax.training.config import TrainConfig, load_config
from specformer_jax.training.data.documents import Document
from specformer_jax.training.data.sources import check_tokenizer, read_documents

# What the shipped configuration has beyond the paper, in the order in which the rows add it: how to leave it out.
BEYOND = {
    "next_token_hook": ("draft.next_token_hook=false",),
    "Muon": ("optimizer=adamw", "learning_rate=0.001"),
    "soft labels": ("soft=0",),
    "slot weights": ("slot_decay=1",),
    "target-initialised layers": ("init=identity",),
    "sequential FFN": ("draft.sequential_ffn=none",),
}
# What a larger head could have beyond the shipped one.
LARGER = {
    "8 slots": ("draft.max_draft_length=8",),
    "two draft blocks": ("draft.draft_blocks=2",),
}
TEXT_TOKENS = 64  # shorter texts are mostly single questions: they are left out
# Half the shipped batch, as so few tokens teach more in more steps; and of those, some for the rate to rise in.
COMMON = ("batch_rows=4", "warmup=0.2")


def rows(work: Path) -> dict[str, list[str]]:
    """Name -> the options of its `train.py fit` beyond those of all rows, in the order of the table."""
    parts = list(BEYOND)
    paper = _set(BEYOND[part] for part in parts)
    others = ["--data", str(work / "texts.jsonl"), "--offline", str(work / "hooks-texts")]
    table = {
        "paper": paper,
        "paper, causal draft attention": [*paper, "--set", "draft.bidirectional=false"],
        "paper, plain position embedding": [*paper, "--set", "draft.positional_ffn=false"],
        "paper, whole draft vocabulary": [*paper, "--set", "draft.draft_vocab_size=none"],
        "paper, others' texts": [*others, *paper],
    }
    table |= {f"+ {part}": _set(BEYOND[later] for later in parts[i:]) for i, part in enumerate(parts, 1)}
    table["shipped (all of these), others' texts"] = others
    return table | {f"shipped, {name}": _set([changes]) for name, changes in LARGER.items()}


def _set(changes: Iterable[Sequence[str]]) -> list[str]:
    return [word for change in itertools.chain.from_iterable(changes) for word in ("--set", change)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="answers of `train.py distill`")
    parser.add_argument("--texts", required=True, help="JSONL with texts that the target did not write, as `prompt`")
    parser.add_argument("--json", required=True, type=Path, metavar="FILE", help="the report; its rows are kept")
    parser.add_argument("--work", default=Path("runs/ablations"), type=Path, help="directory of answers, hooks, runs")
    parser.add_argument("--config", default="configs/smollm2_135m.py", help="the shipped configuration")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="in every row")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--answers", type=int, default=208, help="to train on; 6 or 7 of them make a step")
    parser.add_argument("--held-out", type=int, default=48, help="greedy answers that kappa is counted along")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="SEED", help="of `fit`, one run each")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows of the table")
    options = parser.parse_args(arguments)
    return command_line.run_command(lambda: print_report(options))


def print_report(options: argparse.Namespace) -> None:
    """Trains and counts the rows that are missing, and shows the table."""
    table = rows(options.work)
    chosen = options.rows or list(table)
    if unknown := set(chosen) - set(table):
        raise UserError(f"--rows {sorted(unknown)} is none of {', '.join(table)}")
    command_line.keep_compiled_programs()
    config = load_config(options.config, options.set)
    train_on, held_out = write_data(options, config)
    changes = [word for change in [*COMMON, f"steps={options.steps}", *options.set] for word in ("--set", change)]
    common = ["fit", "--config", options.config, "--data", str(options.work / "answers.jsonl")]
    common += ["--offline", str(options.work / "hooks"), *changes]
    found: dict[str, Any] = {
        "target": config.target,
        "dtype": config.dtype,
        "draft_length": config.draft.max_draft_length,
        "steps": options.steps,
        "answers": len(train_on),
        "held_out": len(held_out),
        "command": "python train.py " + shlex.join(common),
    }
    found["rows"] = stored_rows(options.json, found)
    for seed, name in itertools.product(options.seeds, chosen):
        if any((row["name"], row["seed"]) == (name, seed) for row in found["rows"]):
            continue
        run = options.work / re.sub(r"\W+", "-", f"{name} {seed}").strip("-")
        shutil.rmtree(run, ignore_errors=True)  # what a killed row left: it may be of another budget
        head = drafters.train_head(run, [*common, *table[name], "--set", f"seed={seed}"])
        lm = load(config.target, draft=str(head), lookup=False, dtype=config.dtype)
        [count] = evaluate.offline(lm, held_out, [config.draft.max_draft_length]).passes
        trained = sum(step["tokens"] for step in metrics.read(run / "metrics.jsonl"))
        row = {"name": name, "seed": seed, "options": shlex.join(table[name]), "trained_tokens": int(trained)}
        found["rows"].append(row | count.report())
        found["rows"].sort(key=lambda row: (list(table).index(row["name"]), row["seed"]))
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        say(f"{name}, seed {seed}: kappa {count.kappa:.3f}")
    print(markdown(found))


def stored_rows(file: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a report already has.

    Raises:
      UserError: it is of another budget.
    """
    if not file.exists():
        return []
    stored = json.loads(file.read_text())
    if differing := [key for key in found if stored.get(key) != found[key]]:
        raise UserError(f"the rows in {file} have another {', '.join(differing)}: name another file with --json")
    return stored["rows"]


def write_data(options: argparse.Namespace, config: TrainConfig) -> tuple[list[Document], list[Document]]:
    """Takes answers from all over the data to train on and, greedy ones, to hold out; writes what the rows read.

    Raises:
      UserError: too few answers or texts, or a tokenizer that is not the target's.
    """
    path = weights.resolve(config.target)
    target = read_config(path)
    tokenizer = load_tokenizer(path, target)
    check_tokenizer(options.data, tokenizer.fingerprint)
    documents = list(read_documents(options.data, target.vocab_size))
    held_out = spread([d for d in documents if d.temperature == 0], options.held_out, "greedy answers to hold out")
    names = {document.id for document in held_out}
    train_on = spread([d for d in documents if d.id not in names], options.answers, "other answers to train on")
    texts = (c.turns[0] for c in prompt_files.read_prompts(options.texts))
    encoded = (tokenizer.encode(text + "\n\n", special=False) for text in texts)
    others = by_others(train_on, (ids for ids in encoded if len(ids) >= TEXT_TOKENS))
    for folder in (options.work, options.json.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for name, written in (("answers", train_on), ("texts", others)):
        lines = []
        for d in written:
            for turn, (begin, end) in enumerate(d.answers):
                ids = {"prompt_ids": d.tokens[:begin].tolist(), "response_ids": d.tokens[begin:end].tolist()}
                row = {"id": d.id, "turn": turn, "temperature": d.temperature, **ids}
                lines.append(json.dumps(row) + "\n")
        (options.work / f"{name}.jsonl").write_text("".join(lines))
    return train_on, held_out


def spread(documents: Sequence[Document], count: int, what: str) -> list[Document]:
    """`count` of the documents, evenly spaced."""
    if len(documents) < count:
        raise UserError(f"--data has {len(documents)} {what}, not {count}: ask for fewer or distil more")
    return [documents[i] for i in np.linspace(0, len(documents) - 1, count).astype(int)]


def by_others(documents: Sequence[Document], texts: Iterable[Sequence[int]]) -> list[Document]:
    """The documents with the tokens of other texts, one after the other, in place of their answers'.

    >>> one = Document.of("a", [1], [2, 3, 4])
    >>> [d.tokens.tolist() for d in by_others([one, one], [[5, 6], [7, 8, 9, 10], [11]])]
    [[1, 5, 6, 7], [1, 8, 9, 10]]

    Raises:
      UserError: the texts have fewer tokens than the answers.
    """
    stream = itertools.chain.from_iterable(texts)
    replaced = []
    for document in documents:
        tokens = document.tokens.copy()
        for begin, end in document.answers:
            others = list(itertools.islice(stream, end - begin))
            if len(others) < end - begin:
                raise UserError("--texts has fewer tokens than the answers that it stands in for: give more texts")
            tokens[begin:end] = others
        replaced.append(document._replace(tokens=tokens))
    return replaced


def markdown(found: dict[str, Any]) -> str:
    """The table, and what stands behind it."""
    named = {name: list(rows) for name, rows in itertools.groupby(found["rows"], key=lambda row: row["name"])}
    seeds = sorted({row["seed"] for row in found["rows"]})
    parts = [
        f"{found['target']}, {found['dtype']}. Each row was trained from its start for {found['steps']} steps on "
        f"{found['answers']} answers ({found['rows'][0]['trained_tokens']:,} answer tokens seen); kappa at "
        f"k = {found['draft_length']}, temperature 0, along {found['held_out']} greedy answers that no row was trained "
        "on: the mean of the seeds, then each of them. A row's command is this one with its own options behind it:",
        "",
        f"    {found['command']} --run RUN --set seed=SEED",
        "",
        f"| trained | kappa | {' | '.join(f'seed {seed}' for seed in seeds)} | accepted by position | options |",
        f"| --- | --- | {'--- | ' * len(seeds)}--- | --- |",
    ]
    for name, group in named.items():
        shares = " ".join(f"{share:.3f}" for share in np.mean([row["acceptance"] for row in group], axis=0))
        options = f"`{group[0]['options']}`" if group[0]["options"] else "none: the shipped configuration"
        of_seed = {row["seed"]: f"{row['kappa']:.3f}" for row in group}
        each = " | ".join(of_seed.get(seed, "") for seed in seeds)
        parts.append(f"| {name} | {np.mean([row['kappa'] for row in group]):.3f} | {each} | {shares} | {options} |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
