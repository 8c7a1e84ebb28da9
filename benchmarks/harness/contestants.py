"""Who takes part: this project at each draft length, and transformers. Each answers batches, and they take turns."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness.console import say
from specformer_jax.batch import generation
from specformer_jax.config import SamplingParams, Shape
from specformer_jax.loading import weights
from specformer_jax.loading.language_model import LanguageModel

LOOKUP_TOKENS = 4  # drafts of transformers' prompt lookup: the paper's budget, as the head's k = 4


@dataclasses.dataclass(frozen=True)
class Run:
    """One batch answered once.

    Attributes:
      answers: token ids, the end token included.
      seconds: of the whole call, reading the prompts included.
      decode_seconds: from the first token of the batch on.
      passes: target passes of the batch after its prompts were read.
      row_passes: the same summed over the rows, each row until it was finished.
      accepted: how often the draft at each position was committed, over all rows; empty where it is not counted.
    """

    answers: list[list[int]]
    seconds: float
    decode_seconds: float
    passes: int
    row_passes: int
    accepted: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.answers))


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A way to answer a batch.

    Attributes:
      name: as the report calls it.
      draft_length: k, or None for a baseline.
      run: prompts of token ids, B of them, answered once.
    """

    name: str
    draft_length: int | None
    run: Callable[[Sequence[Sequence[int]]], Run]


def interleave(
    taking_part: Sequence[Contestant], batches: Sequence[Sequence[Sequence[int]]], title: str
) -> dict[str, list[Run]]:
    """Each contestant on each batch; before that each once on the first, to compile and warm up.

    Every batch has an order of its own: threads of other libraries spin for a while after their work is done, and would
    always disturb the same one.
    """
    for contestant in taking_part:
        seconds = contestant.run(batches[0]).seconds
        say(f"{title}: {contestant.name} warmed up in {seconds:.0f} s")
    runs: dict[str, list[Run]] = {contestant.name: [] for contestant in taking_part}
    for number, batch in enumerate(batches, 1):
        for contestant in random.Random(number).sample(taking_part, len(taking_part)):
            runs[contestant.name].append(contestant.run(batch))
        rates = ", ".join(f"{name} {r[-1].tokens / r[-1].seconds:.0f}" for name, r in runs.items())
        say(f"{title}, round {number} of {len(batches)}, tokens/s: {rates}")
    return runs


def ours(lm: LanguageModel, name: str, draft_length: int, sampling_params: SamplingParams, shape: Shape) -> Contestant:
    """This project's `generate_ids` in one compiled shape.

    Args:
      draft_length: k.
      shape: holds every prompt of the benchmark and W >= k + 1.
    """

    def run(prompts: Sequence[Sequence[int]]) -> Run:
        first: list[float] = []
        begin = time.perf_counter()
        found = dict(
            generation.generate_ids(
                lm,
                prompts,
                sampling_params,
                draft_length=draft_length,
                batch_size=len(prompts),
                shape=shape,
                # The first look at the rows comes when the prompts have been read.
                on_rows=lambda indices, rows: None if first else first.append(time.perf_counter()),
            )
        )
        end = time.perf_counter()
        answers = [found[i] for i in range(len(prompts))]
        return Run(
            answers=[a.token_ids for a in answers],
            seconds=end - begin,
            decode_seconds=end - first[0],
            passes=max(a.steps for a in answers),
            row_passes=sum(a.steps for a in answers),
            accepted=tuple(np.sum([a.accepted_per_position for a in answers], axis=0, dtype=int).tolist()),
        )

    return Contestant(name, draft_length, run)


def load_transformers(target: str, dtype: str):
    """transformers' own model of a target.

    Raises:
      ImportError: torch or transformers is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = Path(weights.resolve(target))
    source = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **source).eval()


def transformers(model, name: str, eos_ids: Sequence[int], max_new_tokens: int, lookup: int | None) -> Contestant:
    """transformers' greedy `generate`, plain or with prompt-lookup drafts (batch 1 only).

    Args:
      model: of `load_transformers`.
      lookup: drafts a pass, found by matching n-grams in the prompt and the answer; None decodes plainly.
    """
    import torch

    calls: list[float] = []
    model.register_forward_hook(lambda *_: calls.append(time.perf_counter()))
    drafting = {} if lookup is None else {"prompt_lookup_num_tokens": lookup}

    def run(prompts: Sequence[Sequence[int]]) -> Run:
        longest = max(map(len, prompts))
        ids = torch.tensor([[eos_ids[0]] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        calls.clear()
        begin = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=list(eos_ids),
                pad_token_id=eos_ids[0],
                **drafting,
            )
        end = time.perf_counter()
        answers = [cut(row, eos_ids) for row in output[:, longest:].tolist()]
        passes = len(calls) - 1
        return Run(
            answers=answers,
            seconds=end - begin,
            decode_seconds=end - calls[0],
            passes=passes,
            row_passes=passes if lookup is not None else sum(len(a) - 1 for a in answers),
        )

    return Contestant(name, None, run)


def cut(answer: list[int], eos_ids: Sequence[int]) -> list[int]:
    """An answer up to its end token.

    >>> cut([5, 6, 2, 2, 2], (2,))
    [5, 6, 2]
    """
    end = next((i + 1 for i, token in enumerate(answer) if token in eos_ids), len(answer))
    return answer[:end]
