"""llama.cpp as a contestant, through the C functions that llama-cpp-python binds.

Its Python class copies logits and states around each token; the loop here calls what llama.cpp's own server calls, so
that the peer is at its best. Decoding is greedy, its library's prompt lookup aside.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness.contestants import Contestant, Run


@dataclasses.dataclass(frozen=True)
class ServedRun:
    """Some requests answered, a number of them at a time.

    Attributes:
      answers: token ids, the end token included.
      seconds: from the first submission to the last token.
      first_token_seconds: of each request, from its submission.
    """

    answers: list[list[int]]
    seconds: float
    first_token_seconds: list[float]

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return sum(map(len, self.answers)) / self.seconds


class LlamaCpp:
    """A model with a context for a number of sequences, which share each pass as in llama.cpp's server."""

    def __init__(self, path: Path, *, sequences: int, context: int):
        """`context` is the most positions of one sequence.

        Raises:
          ImportError: llama-cpp-python is not installed.
        """
        import llama_cpp

        self._c = c = llama_cpp
        threads = len(os.sched_getaffinity(0))
        c.llama_backend_init()
        c.llama_log_set(_silent(c), None)
        self._model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
        params = c.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * context, sequences
        params.n_threads = params.n_threads_batch = threads
        self._context = c.llama_init_from_model(self._model, params)
        self._vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        self._most = params.n_batch
        self._batch = c.llama_batch_init(self._most, 0, 1)

    def serve(
        self, prompts: Sequence[Sequence[int]], concurrency: int, eos_ids: Sequence[int], max_new_tokens: int
    ) -> ServedRun:
        """Answers the prompts, so many at a time, a new one as soon as one ends."""
        begin = time.perf_counter()
        answers: list[list[int]] = [[] for _ in prompts]
        submitted: dict[int, float] = {}
        first: list[float] = []
        waiting = list(range(len(prompts)))[::-1]
        free = list(range(concurrency))
        running: dict[int, int] = {}  # sequence -> the prompt that it answers
        while waiting or running:
            self._batch.n_tokens = 0
            asking: list[tuple[int, int]] = []  # sequence and its place in the batch
            for sequence, number in running.items():
                position = len(prompts[number]) + len(answers[number]) - 1
                asking.append((sequence, self._add(answers[number][-1], position, sequence, asks=True)))
            while waiting and free and self._batch.n_tokens + len(prompts[waiting[-1]]) <= self._most:
                number, sequence = waiting.pop(), free.pop()
                running[sequence], submitted[number] = number, time.perf_counter()
                for position, token in enumerate(prompts[number]):
                    at = self._add(token, position, sequence, asks=position == len(prompts[number]) - 1)
                asking.append((sequence, at))
            if self._c.llama_decode(self._context, self._batch):
                raise RuntimeError("llama.cpp could not decode a batch")
            for sequence, at in asking:
                number = running[sequence]
                logits = np.ctypeslib.as_array(self._c.llama_get_logits_ith(self._context, at), (self._vocabulary,))
                answers[number].append(int(logits.argmax()))
                if len(answers[number]) == 1:
                    first.append(time.perf_counter() - submitted[number])
                if answers[number][-1] in eos_ids or len(answers[number]) == max_new_tokens:
                    del running[sequence]
                    free.append(sequence)
                    self._c.llama_memory_seq_rm(self._c.llama_get_memory(self._context), sequence, -1, -1)
        return ServedRun(answers, time.perf_counter() - begin, first)

    def _add(self, token: int, position: int, sequence: int, asks: bool) -> int:
        """Puts a token in the batch, and says where."""
        batch, at = self._batch, self._batch.n_tokens
        batch.token[at], batch.pos[at], batch.logits[at] = token, position, asks
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        batch.n_tokens = at + 1
        return at


def llama_cpp(model: LlamaCpp, eos_ids: Sequence[int], max_new_tokens: int) -> Contestant:
    """Plain decoding, one prompt at a time."""

    def run(prompts: Sequence[Sequence[int]]) -> Run:
        served = model.serve(prompts, 1, eos_ids, max_new_tokens)
        passes = len(served.answers[0]) - 1
        return Run(served.answers, served.seconds, served.seconds - served.first_token_seconds[0], passes, passes)

    return Contestant("llama.cpp", None, run)


def llama_cpp_lookup(path: Path, context: int, eos_ids: Sequence[int], max_new_tokens: int, drafts: int) -> Contestant:
    """llama-cpp-python's own prompt lookup, with `drafts` a pass."""
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    threads = len(os.sched_getaffinity(0))
    drafting = LlamaPromptLookupDecoding(num_pred_tokens=drafts)
    common = dict(n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
    model = Llama(str(path), draft_model=drafting, **common)
    passes: list[int] = []  # the tokens that each read
    read = model.eval
    model.eval = lambda tokens: (passes.append(len(tokens)), read(tokens))[1]

    def run(prompts: Sequence[Sequence[int]]) -> Run:
        (prompt,) = prompts
        passes.clear()
        begin = time.perf_counter()
        answer: list[int] = []
        first = begin
        model.reset()
        for token in model.generate(list(prompt), temp=0.0, repeat_penalty=1.0, reset=True):
            first = first if answer else time.perf_counter()
            answer.append(token)
            if token in eos_ids or len(answer) == max_new_tokens:
                break
        end = time.perf_counter()
        return Run([answer], end - begin, end - first, len(passes) - 1, len(passes) - 1)

    return Contestant("llama.cpp, prompt lookup", None, run)


@functools.cache  # the library keeps no reference to it
def _silent(c):
    """A log function that says nothing."""
    return c.llama_log_callback(lambda *_: None)
