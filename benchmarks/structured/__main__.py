"""Structured output: do answers fit their schemas, are they the same with any drafts, and what does a token take?

    python -m benchmarks.structured --requests 300 --json benchmarks/results/structured.json

Every schema is asked for greedily and at temperature 1, with drafts off, one a step and as the planner chooses, alone
and sixteen at a time: finished answers are validated, tokens compared; and once more with all the drafts that there
are, those that the grammar forces among them and not, for kappa. Then the same prompts, read before, are answered
with and without their grammar in turn, as long as the constrained answers are, one and sixteen at a time; compared are
the seconds of a token that stand side by side, and their median.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jsonschema

from benchmarks.harness import machine
from benchmarks.harness.console import say, show
from benchmarks.structured.schemas import schemas
from specformer_jax.cli import command_line
from specformer_jax.config import SamplingParams
from specformer_jax.decoding.pass_counts import PassCounts
from specformer_jax.engine import Engine, EngineConfig
from specformer_jax.engine.request import Request, Usage
from specformer_jax.grammars import grammar
from specformer_jax.loading.language_model import LanguageModel, load

BUDGETS: tuple[str | int, ...] = ("off", 1, "auto")
TOGETHER = (1, 16)
ENGINE = EngineConfig(rows=16, max_context=1024, chunk=128)
ROUNDS = 3
WORDS = "Answer in JSON. Make something up that fits this schema: "


@dataclasses.dataclass(frozen=True)
class StructuredAnswer:
    """An answer: its tokens, text, why it ended and what it took."""

    ids: list[int]
    text: str
    reason: str
    usage: Usage


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_model_arguments(parser)
    parser.add_argument("--requests", type=int, default=300, help="of the first part")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    options = parser.parse_args(arguments)
    return command_line.run_command(lambda: show(found := run(options), markdown(found), options.json))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark, as `--json` writes it."""
    command_line.keep_compiled_programs()
    lm = load(options.target, draft=options.draft, lookup=options.lookup, dtype=options.dtype)
    asked = [request(lm, schema, seed, options.max_new_tokens) for seed in (None, 1) for schema in schemas()]
    with Engine(lm, ENGINE) as engine:
        found = {
            "target": lm.name,
            "dtype": options.dtype,
            "machine": machine.measure(options.dtype),
            "sameness": sameness(engine, asked, options.requests),
            "seconds": [seconds(engine, asked, together) for together in TOGETHER],
            "kappa": {"forced": kappa(engine, asked, options.requests)},
        }
    with Engine(lm, dataclasses.replace(ENGINE, forced_drafts=False)) as engine:
        found["kappa"]["proposed"] = kappa(engine, asked, options.requests)
    return found


def request(lm: LanguageModel, schema: dict[str, Any], seed: int | None, most: int) -> tuple[dict[str, Any], Request]:
    """A schema, and the request for an answer that fits it; without a seed a greedy one."""
    prompt = lm.tokenizer.chat([{"role": "user", "content": WORDS + json.dumps(schema)[:400]}])
    params = SamplingParams(0.0 if seed is None else 1.0, seed=seed or 0, max_new_tokens=most)
    return schema, Request(tuple(prompt), params, grammar=grammar.of_json_schema(schema))


def sameness(engine: Engine, asked: Sequence[tuple[dict[str, Any], Request]], requests: int) -> dict[str, Any]:
    """How many answers end, fit and are the same at every budget, alone and with others."""
    ended = valid = differ = made = 0
    kappas: list[float] = []
    for begin in range(0, len(asked), 16):
        some = asked[begin : begin + 16]
        runs = [[alone(engine, r, budget) for _, r in some] for budget in BUDGETS] + [together(engine, some)]
        for (schema, _), *answers in zip(some, *runs, strict=True):
            made += len(answers)
            differ += sum(answer.ids != answers[0].ids for answer in answers)
            if answers[0].reason == "stop":
                ended += 1
                valid += is_valid(answers[0].text, schema)
            kappas.append(answers[BUDGETS.index("auto")].usage.kappa)
        say(f"{made} answers, {differ} differ; of {begin + len(some)} schemas {ended} ended, {valid} of them fit")
        if made >= requests:
            break
    return {"requests": made, "differ": differ, "ended": ended, "fit": valid, "kappa": statistics.mean(kappas)}


def kappa(engine: Engine, asked: Sequence[tuple[dict[str, Any], Request]], requests: int) -> float:
    """Tokens a pass, where every step takes all the drafts that there are; of a share of the requests."""
    some = asked[:: max(1, len(asked) * len(BUDGETS) // requests)]
    usages = [alone(engine, r, engine.lm.model.max_draft_length).usage for _, r in some]
    return PassCounts.total([usage.passes for usage in usages]).kappa


def alone(engine: Engine, request: Request, speculative: str | int = "auto") -> StructuredAnswer:
    """The answer with nobody beside it."""
    return wait(engine.submit(dataclasses.replace(request, speculative=speculative)))


def together(engine: Engine, asked: Sequence[tuple[dict[str, Any], Request]]) -> list[StructuredAnswer]:
    """The answers of some requests at a time."""
    return [wait(handle) for handle in [engine.submit(request) for _, request in asked]]


def wait(handle: Any) -> StructuredAnswer:
    """What a handle gives."""
    deltas = list(handle)
    ids = [token.id for delta in deltas for token in delta.tokens]
    return StructuredAnswer(ids, "".join(d.text for d in deltas), deltas[-1].finish_reason, deltas[-1].usage)


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    """Whether a text is JSON that fits a schema."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def seconds(engine: Engine, asked: Sequence[tuple[dict[str, Any], Request]], at_a_time: int) -> dict[str, Any]:
    """Seconds of a token with and without a grammar, so many requests at a time, in turn."""
    ratios, taken = [], {"grammar": list[float](), "free": list[float]()}
    chosen = asked[:: max(1, len(asked) // (ROUNDS * max(4, at_a_time)))]
    for begin in range(0, len(chosen) - at_a_time + 1, at_a_time):
        some = chosen[begin : begin + at_a_time]
        lengths = [len(answer.ids) for answer in together(engine, some)]
        with_grammar, _ = timed(engine, [r for _, r in some])
        free = [
            dataclasses.replace(
                r,
                grammar=None,
                ignore_eos=True,
                sampling_params=dataclasses.replace(r.sampling_params, max_new_tokens=n),
            )
            for (_, r), n in zip(some, lengths, strict=True)
        ]
        without, others = timed(engine, free)
        taken["grammar"].append(with_grammar / sum(lengths))
        taken["free"].append(without / sum(others))
        ratios.append(taken["grammar"][-1] / taken["free"][-1])
    medians = {name: statistics.median(found) for name, found in taken.items()}
    return {"at_a_time": at_a_time, **medians, "ratio": statistics.median(ratios)}


def timed(engine: Engine, requests: Sequence[Request]) -> tuple[float, list[int]]:
    """Seconds of decoding some requests at a time, from the first token of all, and their tokens."""
    begin = time.perf_counter()
    answers = [wait(handle) for handle in [engine.submit(request) for request in requests]]
    reading = min(answer.usage.time_to_first_token for answer in answers)
    return time.perf_counter() - begin - reading, [len(answer.ids) for answer in answers]


def markdown(found: dict[str, Any]) -> str:
    """The report as a table."""
    s = found["sameness"]
    lines = [
        f"{s['requests']} answers, {s['differ']} differ from the one without drafts;"
        f" {s['ended']} schemas' answers ended, {s['fit']} of them fit; kappa {s['kappa']:.2f}",
        "",
        f"kappa with all drafts {found['kappa']['forced']:.2f}, without those that are forced"
        f" {found['kappa']['proposed']:.2f}",
        "",
        "| at a time | ms a token | without a grammar | ratio |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['at_a_time']} | {1e3 * row['grammar']:.1f} | {1e3 * row['free']:.1f} | {row['ratio']:.2f} |"
        for row in found["seconds"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
