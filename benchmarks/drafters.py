"""The drafters side by side under one draft budget, trained on the same answers for the same number of steps.

    python -m benchmarks.drafters --data answers/ --runs runs/drafters --steps 400 --json FILE
    python -m benchmarks.drafters --heads runs/a/head runs/b/head

With --data each of SpecFormer (the configuration's and the paper's), Medusa, EAGLE, DFlash and KV reuse (KV-only and
hybrid; hidden-only is DFlash) is first trained by `train.py fit --drafter NAME` and exported: the same configuration,
batches in the same order, so the same target tokens; a finished run is not repeated. With --heads, exported or
published heads are compared as they are.
The lookups, which need no training, take part in either case. All run in the same decode step as chains of
--draft-length drafts, interleaved as in `benchmarks.decode`. The draft time of a pass is what it takes longer than a
pass over as many tokens in which nobody drafts.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from benchmarks.harness import contestants, machine, prompts, report
from benchmarks.harness.console import say, show
from benchmarks.harness.contestants import Run
from specformer_jax.batch import generation
from specformer_jax.cli import command_line, train
from specformer_jax.config import LOOKUPS, TRAINED, DraftConfig, SamplingParams
from specformer_jax.errors import UserError
from specformer_jax.loading import head_checkpoint
from specformer_jax.loading.language_model import DTYPES, LanguageModel, load

PAPER = "specformer-paper"  # neither the next token nor earlier drafts are read
# Who is trained, as `name_of` has them, and by which settings besides those of the configuration.
CONTESTANTS = {name: () for name in TRAINED if name != "kv"} | {
    PAPER: ("draft.next_token_hook=false", "draft.sequential_ffn=none"),
    "kv-kv": ("draft.reuse=kv",),
    "kv-hybrid": ("draft.reuse=hybrid",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--config", default="configs/smollm2_135m.py", help="how the drafters are trained")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--data", help="answers to train on (train.py distill)")
    parser.add_argument("--runs", default="runs/drafters", help="directory of the runs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--heads", nargs="+", default=[], metavar="DIR", help="compare these exported heads instead")
    parser.add_argument("--draft-length", type=int, default=4, help="k, the same for all")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--prompts", default="builtin", metavar="builtin|FILE.jsonl")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    return command_line.run_command(lambda: print_report(options))


def print_report(options: argparse.Namespace) -> None:
    """Trains what is to be trained, compares, and shows the table."""
    folders = [Path(head) for head in options.heads]
    if not folders:
        if options.data is None:
            raise UserError("give --data to train the drafters on, or --heads that are trained")
        folders = [train_one(name, options) for name in CONTESTANTS]
    command_line.keep_compiled_programs()
    base = load(options.target, draft="none", dtype=options.dtype)
    drafting = {}
    for draft in [*map(str, folders), *LOOKUPS]:
        lm = load(options.target, draft=draft, lookup=False, dtype=options.dtype)
        assert lm.model.drafter is not None
        name = name_of(lm.model.drafter.config)
        if name in drafting:
            raise UserError(f"two heads are {name} drafters: give one of each")
        drafting[name] = dataclasses.replace(lm, params=lm.params | {"target": base.params["target"]})
    encoded = prompts.encode(base, options.prompts)
    sampling_params = SamplingParams(temperature=options.temperature, max_new_tokens=options.max_new_tokens)
    rows = compare(
        base,
        drafting,
        encoded,
        sampling_params,
        k=options.draft_length,
        batch_size=options.batch_size,
        rounds=options.rounds,
    )
    found = {
        "target": base.name,
        "dtype": options.dtype,
        "draft_length": options.draft_length,
        "batch_size": options.batch_size,
        "temperature": options.temperature,
        "steps": None if options.heads else options.steps,
        "machine": machine.measure(options.dtype),
        "drafters": rows,
    }
    show(found, markdown(found), options.json)


def name_of(config: DraftConfig) -> str:
    """The drafter's name, with the form of KV reuse, or that it is the paper's own head."""
    if config.drafter == "kv":
        return f"kv-{config.reuse}"
    papers = config.drafter == "specformer" and not config.next_token_hook and not config.sequential_ffn
    return PAPER if papers else config.drafter


def train_one(name: str, options: argparse.Namespace) -> Path:
    """One drafter by the commands that a user would give; returns its exported head."""
    drafter = name.partition("-")[0]
    settings = [f"steps={options.steps}", *options.set, *CONTESTANTS[name]]
    changes = [word for change in settings for word in ("--set", change)]
    fit = ["fit", "--config", options.config, "--drafter", drafter, "--data", options.data, *changes]
    return train_head(Path(options.runs) / name, fit)


def train_head(run: Path, fit: Sequence[str]) -> Path:
    """Runs a `train.py fit` command, given without its --run, and exports the head; returns the head's folder.

    Raises:
      UserError: training failed, for a reason that the command has printed.
    """
    for command in ([*fit, "--run", str(run)], ["export", "--run", str(run), "--out", str(run / "head")]):
        say("python train.py " + shlex.join(command))
        if train.main(command):
            raise UserError(f"training {run.name} failed: see above")
    return run / "head"


def compare(
    base: LanguageModel,
    drafting: dict[str, LanguageModel],
    encoded: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    *,
    k: int,
    batch_size: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """Each drafter's row: `report.entry`, its parameters and its draft time.

    Args:
      base: the target without a head.
      drafting: the same target with each drafter, by its name.
      encoded: the prompts as token ids.

    Raises:
      UserError: a drafter with fewer than k slots.
    """
    batches = [[encoded[(i * batch_size + row) % len(encoded)] for row in range(batch_size)] for i in range(rounds)]

    def shape(window):
        return generation.job_shape(
            [len(prompt) for batch in batches for prompt in batch],
            sampling_params.max_new_tokens,
            batch_size=batch_size,
            window=window,
            context=base.config.context,
        )

    taking_part = [
        contestants.ours(base, "plain", 0, sampling_params, shape(1)),
        contestants.ours(base, "window", 0, sampling_params, shape(k + 1)),
    ]
    taking_part += [contestants.ours(lm, name, k, sampling_params, shape(k + 1)) for name, lm in drafting.items()]
    runs = contestants.interleave(taking_part, batches, f"k = {k}")
    rows = []
    for contestant in taking_part[2:]:
        name = contestant.name
        rows.append(
            report.entry(contestant, batch_size, runs[name], runs["plain"], {})
            | parameters(drafting[name])
            | {"draft_ms": round(draft_time(runs[name], runs["window"]) * 1e3, 2)}
        )
    return rows


def draft_time(runs: Sequence[Run], windows: Sequence[Run]) -> float:
    """Seconds that a pass takes longer than one over as many tokens without drafts: the median of the rounds."""
    pairs = zip(runs, windows, strict=True)
    return statistics.median(
        a.decode_seconds / max(a.passes, 1) - b.decode_seconds / max(b.passes, 1) for a, b in pairs
    )


def parameters(lm: LanguageModel) -> dict[str, int]:
    """How many a drafter has, and how many of them belong to one slot alone (the paper's position-dependent ones)."""
    head = lm.without_lookup().model.drafter
    assert head is not None
    if "draft" not in lm.params:
        return {"parameters": 0, "position_dependent": 0}
    is_boxed = lambda x: isinstance(x, nn.Partitioned)
    boxed = jax.tree.leaves(head_checkpoint.boxed_params_of(head), is_leaf=is_boxed)
    return {
        "parameters": sum(x.value.size for x in boxed),
        "position_dependent": sum(x.value.size for x in boxed if "slot" in x.names),
    }


def markdown(found: dict[str, Any]) -> str:
    """The table, and how SpecFormer's kappa stands to the others'."""
    rows = found["drafters"]
    trained = "heads as given" if found["steps"] is None else f"each trained for {found['steps']} steps"
    parts = [
        f"{found['target']}, {found['dtype']}, chains of k = {found['draft_length']}, batch {found['batch_size']}, "
        f"temperature {found['temperature']}, {trained}:",
        "",
        "| drafter | parameters | position-dependent | kappa | accepted by position | draft ms | speed-up | theta |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for e in rows:
        shares = " ".join(f"{share:.0%}" for share in e["acceptance"])
        parts.append(
            f"| {e['contestant']} | {e['parameters']:,} | {e['position_dependent']:,} | {e['kappa']:.2f} | {shares} "
            f"| {e['draft_ms']:.1f} | **{e['speedup']:.2f}x** | {e['theta']:.2f} |"
        )
    kappas = {e["contestant"]: e["kappa"] for e in rows}
    if "specformer" in kappas:
        others = [
            f"{kappas['specformer'] - kappa:+.2f} against {name}"
            for name, kappa in kappas.items()
            if name != "specformer"
        ]
        parts += ["", "SpecFormer's kappa: " + ", ".join(others) + "."]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
