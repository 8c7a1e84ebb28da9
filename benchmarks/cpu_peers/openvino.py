"""OpenVINO GenAI as a contestant: it reads the same file, and computes on weights that it compresses anew."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness.contestants import Contestant, Run


def openvino(path: Path, eos_ids: Sequence[int], max_new_tokens: int) -> Contestant:
    """Plain greedy decoding, one prompt at a time.

    Raises:
      ImportError: openvino-genai is not installed.
    """
    import openvino_genai
    from openvino import Tensor

    pipeline = openvino_genai.LLMPipeline(str(path), "CPU")
    how = openvino_genai.GenerationConfig()
    how.max_new_tokens, how.do_sample, how.stop_token_ids = max_new_tokens, False, set(eos_ids)

    def run(prompts: Sequence[Sequence[int]]) -> Run:
        ids = np.array(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(Tensor(ids), Tensor(np.ones_like(ids)))
        begin = time.perf_counter()
        found = pipeline.generate(inputs, how)
        seconds = time.perf_counter() - begin
        answers = [list(map(int, answer)) for answer in found.tokens]
        first = found.perf_metrics.get_ttft().mean / 1e3
        passes = len(answers[0]) - 1
        return Run(answers, seconds, seconds - first, passes, passes)

    return Contestant("OpenVINO", None, run)
