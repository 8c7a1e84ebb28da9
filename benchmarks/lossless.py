"""The lossless contract on the built-in target, token by token.

    python -m benchmarks.lossless [--prompts 50] [--tokens 128] [--dtypes float32,bfloat16] [--json FILE] [--resume]

Greedy and sampled (temperature 0.7, top-p 0.9, min-p 0.05) answers at every k in {0, 1, 3, 5}, at batch 8 with mixed
lengths and at batch 1, and those of an engine that answers 16 at a time, are compared with plain decoding's at batch 8.
In float32 they are the same, and the greedy ones are transformers'. In bfloat16 they are the same on a CPU with native
bodies; elsewhere the tokens that differ are counted, and in one fixed shape (strict) there are none.

The drafts come from an untrained head with five slots unless --draft names one, and from prompt lookup beside it:
whether a draft is right must not matter. A token is greedy for transformers when it is the argmax of its logits after
all tokens before it, which one pass over prompt and answer checks at every position. With --json each part is written
as it ends; --resume goes on after the last one of a run that was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import contestants
from benchmarks.harness.console import say
from benchmarks.harness.prompts import BUILTIN
from benchmarks.harness.report import differing
from specformer_jax.batch import generation, prompt_files
from specformer_jax.config import DraftConfig, SamplingParams, Shape, bucket
from specformer_jax.decoding.model import Model
from specformer_jax.drafters.ngram import WithLookup
from specformer_jax.drafters.specformer import SpecFormer
from specformer_jax.engine import Engine, EngineConfig
from specformer_jax.engine.request import Request
from specformer_jax.loading import fetch
from specformer_jax.loading.language_model import LanguageModel, load
from specformer_jax.nn.target import Target

DRAFT_LENGTHS = (0, 1, 3, 5)
GREEDY = SamplingParams()
SERVED = 16  # rows of the engine
SAMPLED = SamplingParams(temperature=0.7, top_p=0.9, min_p=0.05, seed=1234)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch-sizes", default="8,1")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--draft", metavar="DIR", help="a head of at least five slots; an untrained one by default")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--resume", action="store_true", help="keep the parts that --json has of a run of this size")
    options = parser.parse_args()
    batch_sizes = [int(size) for size in options.batch_sizes.split(",")]
    conversations = prompt_files.read_prompts(BUILTIN)
    step = len(conversations) / options.prompts  # spread over the categories
    texts = [conversations[int(i * step)].turns[0] for i in range(options.prompts)]

    size = {"prompts": options.prompts, "tokens each": options.tokens, "head": options.draft or "untrained"}
    report = ResultFile(options.json, size, options.resume)
    for dtype in options.dtypes.split(","):
        lm = load_model(options.draft, dtype)
        job = Job(lm, dtype, [generation.encode_prompt(lm, [text], raw=False) for text in texts], options.tokens)
        free_shapes(report, job, batch_sizes)
        if dtype == "bfloat16":
            strict(report, job)
    print(json.dumps(report.found, indent=2))


@dataclasses.dataclass(frozen=True)
class Job:
    """What is answered again and again.

    Attributes:
      lm: the model, with drafts that need not be right.
      dtype: what it computes in.
      prompts: token ids.
      tokens: the most of an answer.
    """

    lm: LanguageModel
    dtype: str
    prompts: list[list[int]]
    tokens: int


class ResultFile:
    """What was found so far, written after each part."""

    def __init__(self, path: str | None, size: dict[str, int | str], resume: bool):
        """`resume` keeps the parts that the file has, if they are of this size."""
        self._path = None if path is None else Path(path)
        self.found: dict = dict(size)
        if resume and self._path is not None and self._path.exists():
            stored = json.loads(self._path.read_text())
            if all(stored.get(name) == value for name, value in size.items()):
                self.found = stored

    def missing(self, part: str) -> bool:
        """Whether a part has to be run."""
        return part not in self.found

    def add(self, part: str, result: dict | str) -> None:
        """Keeps what a part found."""
        self.found[part] = result
        if self._path is not None:
            self._path.write_text(json.dumps(self.found, indent=2) + "\n")


def markdown(found: dict, name: str = "") -> str:
    """A table of what was compared, a row a part."""
    rows = [] if name else ["| | tokens compared | tokens that differ |", "|---|---|---|"]
    for key, value in found.items():
        part = f"{name} {key}".strip()
        if isinstance(value, dict) and "tokens compared" in value:
            rows.append(f"| {part} | {value['tokens compared']:,} | {value['tokens that differ']:,} |")
        elif isinstance(value, dict):
            rows.append(markdown(value, part))
    return "\n".join(rows)


def free_shapes(report: ResultFile, job: Job, batch_sizes: list[int]) -> None:
    """Every k at every batch size against k = 0 at the first one, and an engine; in float32 transformers, too."""
    for name, sampling_params in (("greedy", GREEDY), ("sampled", SAMPLED)):
        title = f"{job.dtype} {name}"
        sampling_params = dataclasses.replace(sampling_params, max_new_tokens=job.tokens)
        parts = {f"{title}, batch {size}": size for size in batch_sizes}
        engine, check = f"{title}, engine, {SERVED} at a time", f"{title} against transformers"
        checked = (job.dtype, name) == ("float32", "greedy")
        if not any(map(report.missing, [*parts, engine, *[check] * checked])):
            continue
        reference = run(job, sampling_params, 0, batch_sizes[0], title)
        if checked and report.missing(check):
            report.add(check, against_transformers(job.prompts, reference))
        for part, size in parts.items():
            # At the first size plain decoding is the reference itself.
            lengths = [k for k in DRAFT_LENGTHS if (k, size) != (0, batch_sizes[0])]
            if report.missing(part):
                report.add(part, compared([run(job, sampling_params, k, size, title) for k in lengths], reference))
        if report.missing(engine):
            report.add(engine, compared([served(job, sampling_params)], reference))


def strict(report: ResultFile, job: Job) -> None:
    """Sampled answers at every k against k = 0, in one fixed shape."""
    part = f"{job.dtype} strict"
    if not report.missing(part):
        return
    sampling_params = dataclasses.replace(SAMPLED, max_new_tokens=job.tokens)
    longest = max(map(len, job.prompts)) + job.tokens
    shape = Shape(rows=8, window=max(DRAFT_LENGTHS) + 1, chunk=64, positions=longest)
    reference, *others = (run(job, sampling_params, k, 8, part, shape) for k in DRAFT_LENGTHS)
    report.add(part, compared(others, reference))


def compared(others: list[list[list[int]]], reference: list[list[int]]) -> dict[str, int]:
    """How many tokens, and answers, of some runs are not the reference's."""
    found = [differing(answers, reference) for answers in others]
    return {
        "tokens compared": sum(len(answer) for answers in others for answer in answers),
        "tokens that differ": sum(tokens for tokens, _ in found),
        "answers compared": len(others) * len(reference),
        "answers that differ": sum(parted for _, parted in found),
    }


def load_model(draft: str | None, dtype: str) -> LanguageModel:
    """The built-in target with the head named, or an untrained one of five slots; prompt lookup beside it."""
    if draft is not None:
        return load(draft=draft, dtype=dtype)
    lm = load(draft="none", dtype=dtype)
    config = DraftConfig(max_draft_length=max(DRAFT_LENGTHS), next_token_hook=True).bind(lm.config)
    head = SpecFormer(lm.config, config, dtype)
    width = lm.config.width
    made = head.init(jax.random.key(0), jnp.zeros((1, 2, len(config.hook_layers), width)), jnp.zeros((1, 2, width)))
    params = lm.params | {"draft": jax.tree.map(lambda x: x.astype(dtype), nn.unbox(made)["params"])}
    model = Model(Target(lm.config, config.hook_layers, dtype), WithLookup.around(head))
    return dataclasses.replace(lm, model=model, params=params)


def run(
    job: Job, sampling_params: SamplingParams, k: int, batch_size: int, name: str, shape: Shape | None = None
) -> list[list[int]]:
    """The answers' tokens, and a line about them."""
    begin = time.perf_counter()
    found = dict(
        generation.generate_ids(
            job.lm, job.prompts, sampling_params, draft_length=k, batch_size=batch_size, shape=shape
        )
    )
    answers = [found[i] for i in range(len(job.prompts))]
    passes = sum(a.steps for a in answers)
    kappa = (sum(a.completion_tokens for a in answers) - len(answers)) / max(passes, 1)
    say(f"{name}, k = {k}, batch {batch_size}: kappa {kappa:.3f}, {time.perf_counter() - begin:.0f} s")
    return [a.token_ids for a in answers]


def served(job: Job, sampling_params: SamplingParams) -> list[list[int]]:
    """The answers' tokens, all prompts at once over the rows of an engine that drafts what the planner says."""
    begin = time.perf_counter()
    context = bucket(max(map(len, job.prompts)) + job.tokens)
    with Engine(job.lm, EngineConfig(rows=SERVED, max_context=context)) as engine:
        handles = [engine.submit(Request(tuple(prompt), sampling_params)) for prompt in job.prompts]
        answers = [[token.id for delta in handle for token in delta.tokens] for handle in handles]
    say(f"{job.dtype}, {SERVED} at a time: {time.perf_counter() - begin:.0f} s with the engine's start")
    return answers


def against_transformers(prompts: list[list[int]], answers: list[list[int]]) -> dict | str:
    """How many tokens of the answers are not transformers' argmax, and the closest call among its top two logits."""
    try:
        import torch

        model = contestants.load_transformers(fetch.BUILTIN, "float32")
    except ImportError:
        return "torch and transformers are not installed"
    wrong, tokens, closest = 0, 0, np.inf
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        top = logits.topk(2)
        wrong += int((top.indices[:, 0] != torch.tensor(answer)).sum())
        closest = min(closest, float((top.values[:, 0] - top.values[:, 1]).min()))
        tokens += len(answer)
    return {"tokens compared": tokens, "tokens that differ": wrong, "smallest gap of the top two logits": closest}


if __name__ == "__main__":
    main()
