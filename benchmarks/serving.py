"""The engine under load: plain decoding, every fixed k and the planner's choice, at several concurrencies.

    python -m benchmarks.serving --requests 200 --concurrency 1,4,16 --json benchmarks/results/serving.json

One engine serves all. At each concurrency the requests are dealt into rounds, fewer where many are answered at a time;
in every round each policy answers the same requests, that many at a time, a new one as soon as one ends: in an order of
the round's own, and with nothing of them in the cache. Compared are the ratios of throughputs that stand side by side,
and their median. All programs are compiled before the first timing.

Then continuous batching: all requests at once, decoded plainly, against the time that their prompts take to be read
(the same requests for one token each) plus the time that their passes take with every row full.
"""

from __future__ import annotations

import argparse
import dataclasses
import queue
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import machine, prompts
from benchmarks.harness.console import add_answer_arguments, numbers, say, show
from benchmarks.harness.report import paired
from specformer_jax.batch import generation, prompt_files
from specformer_jax.cli import command_line
from specformer_jax.config import SamplingParams, bucket
from specformer_jax.engine import Engine, EngineConfig, step_costs
from specformer_jax.engine.request import Delta, Request, Usage
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel, load
from specformer_jax.planning.planner import BudgetPolicy, FixedDrafts

REPEATS = 3  # of the measurement of continuous batching
TURNS = 3  # requests of a round for each that is answered at a time: it begins and ends with rows that stand empty


@dataclasses.dataclass(frozen=True)
class LoadRun:
    """Some requests answered once.

    Attributes:
      seconds: from the first submission to the last token.
      usages: of the requests.
    """

    seconds: float
    usages: list[Usage]

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return sum(u.completion_tokens for u in self.usages) / self.seconds

    @property
    def row_steps(self) -> int:
        """Passes of all rows."""
        return sum(u.steps for u in self.usages)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_model_arguments(parser)
    parser.add_argument("--prompts", nargs="+", metavar="FILE.jsonl", help="default: benchmarks/prompts.jsonl")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", default="1,4,16", metavar="N,N,...")
    parser.add_argument("--draft-lengths", default="all", metavar="all|K,K,...", help="the k that are compiled")
    parser.add_argument("--rounds", type=int, default=10, help="the most at each concurrency")
    add_answer_arguments(parser)
    parser.add_argument("--costs", metavar="FILE", help="keep the measured cost table there")
    options = parser.parse_args(arguments)
    return command_line.run_command(lambda: print_report(options))


def print_report(options: argparse.Namespace) -> None:
    """Runs the benchmark and shows it."""
    found = run(options)
    show(found, markdown(found), options.json)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark, as `--json` writes it.

    Raises:
      UserError: options that do not fit together, or what `language_model.load` raises.
    """
    sizes = numbers("--concurrency", options.concurrency, least=1)
    if not 1 <= options.rounds <= options.requests:
        raise UserError(f"--rounds {options.rounds} must be within 1 and the {options.requests} requests")
    command_line.keep_compiled_programs()
    lm = load(options.target, draft=options.draft, lookup=options.lookup, dtype=options.dtype)
    encoded = read_prompts(lm, options.prompts, options.requests)
    sampling_params = SamplingParams(temperature=options.temperature, max_new_tokens=options.max_new_tokens)
    requests = [
        Request(tuple(prompt), dataclasses.replace(sampling_params, seed=seed), streams=False)
        for seed, prompt in enumerate(encoded)
    ]
    config = EngineConfig(
        rows=max(sizes),
        max_context=min(bucket(max(map(len, encoded)) + sampling_params.max_new_tokens), lm.config.context),
        max_queue=len(requests),
        costs=options.costs,
    )
    say("compiling and timing the programs")
    begin = time.perf_counter()
    with Engine(lm, config) as engine:
        say(f"ready after {time.perf_counter() - begin:.0f} s")
        policies = choose_policies(engine, options.draft_lengths)
        entries = []
        for size in sizes:
            rounds = max(1, min(options.rounds, len(requests) // (TURNS * size)))
            entries += compare(engine, policies, deal(requests, rounds), size)
        full = continuous_batching(engine, requests)
        table = {f"{size} tokens": round(s * 1e3, 2) for size, s in engine_costs(policies).items()}
    return {
        "target": lm.name,
        "draft": lm.draft_name and Path(lm.draft_name).name,
        "dtype": options.dtype,
        "temperature": options.temperature,
        "max_new_tokens": sampling_params.max_new_tokens,
        "requests": len(requests),
        "rounds": options.rounds,
        "max_context": config.max_context,
        "machine": machine.measure(options.dtype),
        "step_ms": table,
        "entries": entries,
        "continuous_batching": full,
    }


def read_prompts(lm: LanguageModel, files: Sequence[str] | None, count: int) -> list[list[int]]:
    """Token ids of so many first turns, taken in turn from the files and begun again where they end."""
    conversations = [prompt_files.read_prompts(file) for file in files or ()] or [prompts.read_builtin()]
    longest = max(map(len, conversations))
    mixed = [found[i] for i in range(longest) for found in conversations if i < len(found)]
    return [generation.encode_turn(lm, mixed[i % len(mixed)], [], raw=False) for i in range(count)]


def choose_policies(engine: Engine, draft_lengths: str) -> dict[str, BudgetPolicy]:
    """Name -> policy, plain decoding first and the planner last."""
    longest = engine.lm.model.max_draft_length
    if longest == 0:
        say("there is no draft head for this target: every policy decodes plainly")
    asked = range(1, longest + 1) if draft_lengths == "all" else numbers("--draft-lengths", draft_lengths, least=0)
    lengths = [k for k in asked if 0 < k <= longest]
    calibration = engine.planner.calibration
    fixed: dict[str, BudgetPolicy] = {f"k = {k}": FixedDrafts(k, calibration) for k in lengths}
    return {"off": FixedDrafts(0, calibration), **fixed, "auto": engine.planner}


def engine_costs(policies: dict[str, BudgetPolicy]) -> dict[int, float]:
    """The table that the planner went by; empty where there is nothing to choose."""
    table = getattr(policies["auto"], "costs", None)
    return {} if table is None else dict(table.seconds)


def deal(requests: Sequence[Request], rounds: int) -> list[list[Request]]:
    """The requests in so many rounds of about equal size."""
    return [list(requests[i::rounds]) for i in range(rounds)]


def compare(
    engine: Engine, policies: dict[str, BudgetPolicy], rounds: Sequence[list[Request]], size: int
) -> list[dict[str, Any]]:
    """Every policy on every round, `size` requests at a time."""
    runs: dict[str, list[LoadRun]] = {name: [] for name in policies}
    for number, requests in enumerate(rounds, 1):
        for name in random.Random(number).sample(list(policies), len(policies)):
            engine.planner = policies[name]
            engine.reset_prefix_cache()  # or whoever comes first would read the prompts for all
            runs[name].append(answer(engine, requests, size))
        rates = ", ".join(f"{name} {r[-1].rate:.0f}" for name, r in runs.items())
        say(f"concurrency {size}, round {number} of {len(rounds)}, tokens/s: {rates}")
    rates = {name: [run.rate for run in found] for name, found in runs.items()}
    fixed = [name for name in runs if name != "auto"]
    best = max(fixed, key=lambda name: paired(rates[name], rates["off"]))
    return [entry(name, size, found, rates[name], rates["off"], rates[best], best) for name, found in runs.items()]


def entry(
    name: str, size: int, runs: list[LoadRun], rates: list[float], off: list[float], best: list[float], best_name: str
) -> dict[str, Any]:
    """One policy at one concurrency."""
    usages = [u for run in runs for u in run.usages]
    steps = sum(u.steps for u in usages)
    made = sum(u.completion_tokens for u in usages)
    each = [(u.seconds - u.time_to_first_token) / (u.completion_tokens - 1) for u in usages if u.completion_tokens > 1]
    return {
        "concurrency": size,
        "policy": name,
        "tokens_per_second": round(statistics.median(rates), 2),
        "over_off": round(paired(rates, off), 3),
        "over_best_fixed": round(paired(rates, best), 3),
        "best_fixed": best_name,
        "kappa": round((made - len(usages)) / max(steps, 1), 3),
        "tokens_per_verified": round((made - len(usages)) / max(steps + sum(u.drafted_tokens for u in usages), 1), 3),
        "time_to_first_token": round(statistics.median(u.time_to_first_token for u in usages), 4),
        "time_per_token": round(statistics.median(each), 5) if each else None,
        "tokens": made,
        "tokens_per_second_by_round": [round(rate, 2) for rate in rates],
    }


def answer(engine: Engine, requests: Sequence[Request], concurrency: int) -> LoadRun:
    """Answers the requests, so many at a time."""
    ended: queue.SimpleQueue[Delta] = queue.SimpleQueue()

    def note(delta: Delta) -> None:
        if delta.finish_reason is not None:
            ended.put(delta)

    begin = time.perf_counter()
    usages: list[Usage] = []
    for number, request in enumerate(requests):
        if number >= concurrency:
            usages.append(ended.get().usage)
        engine.submit(request).subscribe(note)
    while len(usages) < len(requests):
        usages.append(ended.get().usage)
    return LoadRun(time.perf_counter() - begin, usages)


def continuous_batching(engine: Engine, requests: Sequence[Request]) -> dict[str, Any]:
    """All requests at once, against what they need at full rows; a few times."""
    engine.planner, rows = FixedDrafts(0, engine.planner.calibration), engine.config.rows
    one_token = [
        dataclasses.replace(r, sampling_params=dataclasses.replace(r.sampling_params, max_new_tokens=1))
        for r in requests
    ]
    ratios = []
    for _ in range(REPEATS):
        read = answer(engine, one_token, len(requests)).seconds
        step = step_costs.measure_step(engine.compiled_steps, rows)
        found = answer(engine, requests, len(requests))
        step = (step + step_costs.measure_step(engine.compiled_steps, rows)) / 2
        ratios.append(found.seconds / (read + found.row_steps / rows * step))
        say(
            f"{len(requests)} requests at once: {found.seconds:.1f} s; reading takes {read:.1f} s, {found.row_steps}"
            f" passes at {rows} rows {found.row_steps / rows * step:.1f} s: {ratios[-1]:.2f}x"
        )
    return {
        "rows": rows,
        "requests": len(requests),
        "over_full_rows": round(statistics.median(ratios), 3),
        "over_full_rows_by_repeat": [round(ratio, 3) for ratio in ratios],
    }


def markdown(found: dict[str, Any]) -> str:
    """The table of throughputs, and the sentence about continuous batching."""
    m = found["machine"]
    lines = [
        f"{found['target']}, {found['dtype']}, head {found['draft'] or 'none'}, temperature {found['temperature']},"
        f" {found['requests']} requests of at most {found['max_new_tokens']} tokens in up to {found['rounds']} rounds."
        f" {m['device']}, {m['cores']} cores, rho = {m['rho']}.",
        "",
        "| concurrency | policy | tokens/s | over off | over the best fixed k | kappa | tokens a verified one |"
        " first token, s | s a token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for e in found["entries"]:
        lines.append(
            f"| {e['concurrency']} | {e['policy']} | {e['tokens_per_second']:.1f} | {e['over_off']:.2f}x |"
            f" {e['over_best_fixed']:.2f}x ({e['best_fixed']}) | {e['kappa']:.2f} | {e['tokens_per_verified']:.2f} |"
            f" {e['time_to_first_token']:.2f} | {e['time_per_token'] or 0:.4f} |"
        )
    c = found["continuous_batching"]
    lines += [
        "",
        f"Continuous batching, {c['requests']} requests at once over {c['rows']} rows, decoded plainly:"
        f" {c['over_full_rows']:.2f}x the time of reading their prompts and of their passes with every row full.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
