"""How many drafts a batch job decodes with when nobody says: what a step brings here, by what it costs here.

One row is bound by reading the weights, where a few drafts cost little on any device, and its user waits for the first
word: it takes `ONE_ROW` drafts, unmeasured. For more rows a few k are timed in the steps that would decode, plain
decoding among them as it is at its best, and the k is taken that promises the most tokens a second; unless that is
hardly more than plain decoding's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping

import jax
import numpy as np

from specformer_jax.batch.row_batch import run_steps
from specformer_jax.config import SamplingParams, Shape
from specformer_jax.decoding import sampling
from specformer_jax.decoding.model import Model
from specformer_jax.decoding.state import DecodeState, init_state, midway
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.planning import cost_table, planner

ONE_ROW = 3  # of the shipped head, with lookup, a fourth draft pays no more on one row
STEPS = 2  # decode steps of a timed call
MARGIN = 0.1  # drafting must promise so much more than plain decoding: the timing and the head's card are estimates
ANSWER, BATCHES = 64, 32  # tokens of each answer, and batches, over which the slowest row is simulated
MEASURING = "/specformer/measure"  # the event of `jax.monitoring` that tells how long timing took, in seconds

_chosen: dict[Hashable, int] = {}


def choose(lm: LanguageModel, shape_of: Callable[[int], Shape], sampling_params: SamplingParams) -> int:
    """k for a job; jobs in the same shapes are measured once a process, share the k of the first, and compile nothing.

    Args:
      lm: the model with its drafter; without one k is 0.
      shape_of: takes k to the shape that would decode with so many drafts; where that holds fewer, this k is ruled out.
      sampling_params: how the job is sampled, for the timing.
    """
    longest = min(lm.model.max_draft_length, shape_of(lm.model.max_draft_length).window - 1)
    rows = shape_of(0).rows
    if rows == 1:
        return min(ONE_ROW, longest)
    shapes = {k: shape_of(k) for k in sorted({0, 1, 2, longest}) if k <= longest}
    if len(shapes) == 1:
        return 0
    key = lm.model, lm.draft_name, tuple(shapes.items())
    if key not in _chosen:
        acceptance = np.cumprod(planner.chances(lm.model.max_draft_length, lm.acceptance))
        seconds = measure(lm, shapes, sampling_params)
        rates = {k: tokens_per_step(acceptance[:k], rows) / seconds[k] for k in shapes}
        best = max(rates, key=lambda k: rates[k])
        _chosen[key] = best if rates[best] > rates[0] * (1 + MARGIN) else 0
    return _chosen[key]


def tokens_per_step(acceptance: np.ndarray, rows: int) -> float:
    """Tokens that a row of a batch commits a step, where a batch takes as many steps as its slowest row.

    Args:
      acceptance: how often the first j + 1 drafts are all right, f[k].
      rows: how many rows the batch has.

    >>> [round(tokens_per_step(np.array([0.5]), rows), 1) for rows in (1, 4, 64)]
    [1.5, 1.4, 1.3]
    >>> tokens_per_step(np.array([]), 64)
    1.0
    """
    luck = np.random.default_rng(0).random((BATCHES, rows, ANSWER, 1))
    committed = 1 + (luck < acceptance).sum(axis=-1)
    steps = 1 + (committed.cumsum(axis=-1) < ANSWER).sum(axis=-1)  # [BATCHES, rows]
    return ANSWER / float(steps.max(axis=1).mean())


def measure(lm: LanguageModel, shapes: Mapping[int, Shape], sampling_params: SamplingParams) -> dict[int, float]:
    """Seconds of a decode step by k, each in its shape; compiles them first."""
    lms = {k: lm.in_window(shape.window) for k, shape in shapes.items()}

    def time_step(k: int) -> float:
        state = jax.block_until_ready(running(lms[k].model, shapes[k], sampling_params))
        begin = time.perf_counter()
        state = run_steps(lms[k], state, STEPS, shapes[k], k)
        steps = int(jax.device_get(state.steps).max())  # waits for the call to end
        return (time.perf_counter() - begin) / steps

    for k in shapes:
        time_step(k)  # compiles
    begin = time.perf_counter()
    seconds = cost_table.in_turn(list(shapes), time_step)
    jax.monitoring.record_event_duration_secs(MEASURING, time.perf_counter() - begin)
    return seconds


def running(model: Model, shape: Shape, sampling_params: SamplingParams) -> DecodeState:
    """A batch with all its rows running in the middle of their context."""
    state = init_state(model, shape, sampling.stack([sampling_params] * shape.rows))
    return midway(state, shape.positions // 2)
