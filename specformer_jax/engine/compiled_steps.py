"""The device side of the engine: one resident batch, the steps compiled for it, and how a request enters a row."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from specformer_jax.config import SamplingParams, Shape
from specformer_jax.decoding import decode, processors, sampling
from specformer_jax.decoding.logprobs import init_logprobs
from specformer_jax.decoding.model import Model, Params
from specformer_jax.decoding.processors import Allowed, Bias
from specformer_jax.decoding.program_store import ProgramStore, shapes
from specformer_jax.decoding.sampling import RowSampling
from specformer_jax.decoding.state import DecodeState, init_state
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn.sharded_kernels import place_pages, whole_columns
from specformer_jax.planning.budgets import StepBudget

COMPILERS = 2  # programs that are compiled at a time; each takes some memory


class StepLogprobs(NamedTuple):
    """The log-probabilities of what a call added to each row, in the columns of `StepReport.tokens`; see `Logprobs`.

    Attributes:
      chosen: how likely the target took each new token to be.
      top_ids: the likeliest tokens at its place, best first.
      top_logprobs: how likely the target took these to be.
    """

    chosen: Float32[Array, "B columns"]
    top_ids: Int32[Array, "B columns top"]
    top_logprobs: Float32[Array, "B columns top"]


class PromptLogprobs(NamedTuple):
    """The log-probabilities of a row's prompt, by position; those of its first token mean nothing.

    Attributes:
      chosen, top_ids, top_logprobs: as in `StepLogprobs`.
    """

    chosen: Float32[Array, " C"]
    top_ids: Int32[Array, "C top"]
    top_logprobs: Float32[Array, "C top"]


class StepReport(NamedTuple):
    """What one call did to each row; small, read back while the next call runs.

    Attributes:
      tokens: the new tokens, from column 0 on; what stands after the last of them means nothing.
      from_draft: whether each new token was an accepted draft.
      added: how many new tokens there are.
      read: how many of the row's tokens are in the cache.
      done: whether the row is finished.
      steps: how many passes of the target the call made for the row.
      drafted: how many drafts the call verified at each place of a chain.
      accepted: how many drafts the call accepted at each place of a chain.
      drafts: the drafts that the row has now; -1 is none.
      confidence: how sure the drafter is of them.
      row_offset: what the row's own record adds to their log odds.
      outcomes: how often drafts were read, and were right, by slot and confidence; of all rows.
    """

    tokens: Int32[Array, "B columns"]
    from_draft: Bool[Array, "B columns"]
    added: Int32[Array, " B"]
    read: Int32[Array, " B"]
    done: Bool[Array, " B"]
    steps: Int32[Array, " B"]
    drafted: Int32[Array, "B J"]
    accepted: Int32[Array, "B J"]
    drafts: Int32[Array, "B J"]
    confidence: Float32[Array, "B J"]
    row_offset: Float32[Array, " B"]
    outcomes: Int32[Array, "J BINS 2"]


class Control(NamedTuple):
    """What the host says about the rows with each call.

    Attributes:
      pages: which pages hold each row.
      stop: whether the row is freed before the first step.
      draft_cap: the most drafts that the row takes.
      calibration: slope and offset of each slot; see `DecodeState`.
      constrained, allowed: which rows follow a grammar, and what it allows in a call of one step; see `Allowed`.
      chain: the drafts of those rows, -1 for none; the others keep theirs.
    """

    pages: Int32[np.ndarray, "B tables"]
    stop: Bool[np.ndarray, " B"]
    draft_cap: Int32[np.ndarray, " B"]
    calibration: Float32[np.ndarray, "J 2"]
    constrained: Bool[np.ndarray, " B"]
    allowed: UInt32[np.ndarray, "B 1+J words"]
    chain: Int32[np.ndarray, "B J"]


class Admission(NamedTuple):
    """A request that enters a row.

    Attributes:
      tokens: the prompt, and what was answered before the request was preempted, if it was.
      prompt: how many of the tokens are the prompt's.
      known: how many tokens there are.
      read: how many of them the row's pages hold.
      limit: the tokens that prompt and answer may have.
      arrival: prompts of rows with a lower number are read first.
      sampling: how the row is sampled.
      asks_logprobs: whether log-probabilities are wanted.
      asks_prompt_logprobs: whether those of the prompt are, too.
    """

    tokens: Int32[np.ndarray, " C"]
    prompt: np.int32
    known: np.int32
    read: np.int32
    limit: np.int32
    arrival: np.int32
    sampling: RowSampling
    asks_logprobs: np.bool_
    asks_prompt_logprobs: np.bool_


def place(state: DecodeState) -> DecodeState:
    """The batch, rows and pages split over the mesh: alike after every program, as each layout is compiled for."""
    rows = jax.tree.map(whole_columns, state._replace(cache=()))
    return rows._replace(cache=place_pages(state.cache))


def empty(model: Model, shape: Shape, pages: int) -> DecodeState:
    """A batch in which every row is free, and may ask for log-probabilities, processors and a grammar."""
    state = init_state(model, shape, _sampling([SamplingParams()] * shape.rows), pages)
    logprobs = init_logprobs(shape.rows, shape.positions, model.target.config.vocab_size)
    return place(state._replace(logprobs=logprobs))


def _sampling(sampling_params: Sequence[SamplingParams], ruled_out: Sequence[Bias] = ()) -> RowSampling:
    return sampling.stack(sampling_params)._replace(processors=processors.stack(sampling_params, ruled_out))


def admit(state: DecodeState, row: Int32[Array, ""], new: Admission) -> DecodeState:
    """Puts a request into a free row."""
    assert state.logprobs is not None

    def put(old: Array, value) -> Array:
        return old.at[row].set(value)

    new_state = state._replace(
        tokens=put(state.tokens, new.tokens),
        prompt=put(state.prompt, new.prompt),
        known=put(state.known, new.known),
        read=put(state.read, new.read),
        limit=put(state.limit, new.limit),
        done=put(state.done, False),
        arrival=put(state.arrival, new.arrival),
        drafts=put(state.drafts, -1),
        surplus=put(state.surplus, 0.0),
        evidence=put(state.evidence, 0.0),
        sampling=jax.tree.map(put, state.sampling, new.sampling),
        logprobs=state.logprobs._replace(
            asked=put(state.logprobs.asked, new.asks_logprobs),
            prompt_asked=put(state.logprobs.prompt_asked, new.asks_prompt_logprobs),
        ),
    )
    return place(new_state)


def advance(
    model: Model,
    params: Params,
    state: DecodeState,
    control: Control,
    steps: Int32[Array, ""],
    *,
    budget: StepBudget,
    width: int,
) -> tuple[DecodeState, StepReport, StepLogprobs]:
    """A few steps of the batch under what the host says."""
    before = state._replace(
        pages=jnp.asarray(control.pages),
        done=state.done | control.stop,
        draft_cap=jnp.asarray(control.draft_cap),
        calibration=jnp.asarray(control.calibration),
        allowed=Allowed(jnp.asarray(control.constrained), jnp.asarray(control.allowed)),
    )
    constrained = jnp.asarray(control.constrained)[:, None]
    drafts = jnp.where(constrained, control.chain, before.drafts)
    # A draft of the grammar's is as good as forced.
    sure = jnp.where(constrained & (drafts != before.drafts), 1.0, before.confidence)
    before = before._replace(drafts=drafts, confidence=sure)
    after = decode.run(model, params, before, steps, size=budget.size, chunk=budget.chunk)
    return place(after._replace(allowed=None)), *_report(before, after, width)


def _report(before: DecodeState, after: DecodeState, width: int) -> tuple[StepReport, StepLogprobs]:
    columns = jnp.minimum(before.known[:, None] + jnp.arange(width), after.tokens.shape[1] - 1)

    def new(x):
        return jnp.take_along_axis(x, columns.reshape(*columns.shape, *[1] * (x.ndim - 2)), axis=1)

    report = StepReport(
        tokens=new(after.tokens),
        from_draft=new(after.from_draft),
        added=after.known - before.known,
        read=after.read,
        done=after.done,
        steps=after.steps - before.steps,
        drafted=after.drafted - before.drafted,
        accepted=after.accepted - before.accepted,
        drafts=after.drafts,
        confidence=after.confidence,
        row_offset=after.row_offset,
        outcomes=after.outcomes - before.outcomes,
    )
    assert after.logprobs is not None
    return report, StepLogprobs(
        new(after.logprobs.chosen), new(after.logprobs.top_ids), new(after.logprobs.top_logprobs)
    )


def prompt_logprobs(state: DecodeState, row: Int32[Array, ""]) -> PromptLogprobs:
    """What is known of a row's prompt by now."""
    assert state.logprobs is not None
    return PromptLogprobs(state.logprobs.chosen[row], state.logprobs.top_ids[row], state.logprobs.top_logprobs[row])


jit_empty = jax.jit(empty, static_argnames=("model", "shape", "pages"))
jit_admit = jax.jit(admit, donate_argnames=("state",))
jit_prompt_logprobs = jax.jit(prompt_logprobs)
jit_advance = jax.jit(advance, static_argnames=("model", "budget", "width"), donate_argnames=("state",))


class CompiledSteps:
    """The compiled functions of one engine, with the sizes they share.

    Attributes:
      model: the model that the functions run.
      params: the arrays of the model.
      budgets: the steps that are compiled, by how many tokens they read; those that read prompts come last.
      shape: rows, drafts and positions of the batch.
      pages: how many pages the cache has.
      steps: the most steps of a call.
      width: the most tokens that a call can add to a row.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        budgets: Sequence[StepBudget],
        rows: int,
        context: int,
        pages: int,
        steps: int,
        store: ProgramStore | None = None,
    ):
        """With a `store` compiled programs are kept between starts; the others are as in the class."""
        self.model, self.params = model, params
        self.budgets, self.pages, self.steps = tuple(budgets), pages, steps
        self.shape = Shape(rows, model.max_draft_length + 1, max(b.chunk for b in budgets), context)
        self.width = steps * self.shape.window
        self._store, self._programs = store, dict[StepBudget, Compiled]()
        words = -(-model.target.config.vocab_size // 32)
        self._all_forbidden = np.zeros((rows, self.shape.window, words), np.uint32)

    @property
    def tables(self) -> int:
        """How many pages a row may hold."""
        return cache_lib.pages_for(self.shape.positions)

    def empty(self) -> DecodeState:
        """A batch of free rows."""
        return jit_empty(self.model, self.shape, self.pages)

    def control(self) -> Control:
        """What leaves every row as it is, with all the drafts it has."""
        rows, J = self.shape.rows, self.model.max_draft_length
        return Control(
            np.zeros((rows, self.tables), np.int32),
            np.zeros(rows, bool),
            np.full(rows, J, np.int32),
            np.tile(np.array([1, 0], np.float32), (J, 1)),
            np.zeros(rows, bool),
            self._all_forbidden,
            np.full((rows, J), -1, np.int32),
        )

    def admit(
        self,
        state: DecodeState,
        row: int,
        tokens: Sequence[int],
        *,
        prompt: int,
        read: int,
        limit: int,
        arrival: int,
        sampling_params: SamplingParams,
        asks_logprobs: bool,
        asks_prompt_logprobs: bool = False,
        ruled_out: Sequence[Bias] = (),
    ) -> DecodeState:
        """Puts a request into a free row; see `Admission`, and `processors.stack` for `ruled_out`."""
        padded = np.zeros(self.shape.positions, np.int32)
        padded[: len(tokens)] = tokens
        new = Admission(
            tokens=padded,
            prompt=np.int32(prompt),
            known=np.int32(len(tokens)),
            read=np.int32(read),
            limit=np.int32(limit),
            arrival=np.int32(arrival),
            sampling=jax.tree.map(lambda x: np.asarray(x)[0], _sampling([sampling_params], ruled_out)),
            asks_logprobs=np.bool_(asks_logprobs),
            asks_prompt_logprobs=np.bool_(asks_prompt_logprobs),
        )
        return jit_admit(state, np.int32(row), new)

    def advance(self, state: DecodeState, control: Control, steps: int, budget: StepBudget):
        """A few steps, of a program that `warm_up` has compiled; returns the state, the report and the logprobs."""
        return self._programs[budget](self.params, state, control, np.int32(steps))

    def prompt_logprobs(self, state: DecodeState, row: int) -> PromptLogprobs:
        """The log-probabilities of a row's prompt, as far as it is read."""
        return jit_prompt_logprobs(state, np.int32(row))

    def warm_up(self, log=lambda text: None) -> None:
        """Compiles everything that serving can call, or finds it in the store, and calls it."""
        state, control = self.empty(), self.control()
        with ThreadPoolExecutor(COMPILERS) as compilers:
            # A program is traced while those before it are compiled.
            programs = {budget: self._program(budget, state, control, compilers, log) for budget in self.budgets}
            self._programs = {budget: program.result() for budget, program in programs.items()}
        for budget in self.budgets:
            state = self.admit(
                state, 0, [0], prompt=1, read=0, limit=2, arrival=0, sampling_params=SamplingParams(),
                asks_logprobs=False,
            )  # fmt: skip
            state, report, logprobs = self.advance(state, control, 1, budget)
            jax.device_get((report, logprobs))
        jax.device_get(self.prompt_logprobs(state, 0))

    def _program(
        self, budget: StepBudget, state: DecodeState, control: Control, compilers: ThreadPoolExecutor, log
    ) -> Future[Compiled]:
        """The program of one budget: from the store, or from one of the compilers when it is ready."""
        arguments = (self.params, state, control, np.int32(1))
        if self._store is not None:
            key = self._store.key(self.model, budget, self.width, shapes(arguments))
            if stored := self._store.load(key):
                ready: Future[Compiled] = Future()
                ready.set_result(stored)
                return ready
        log(f"compiling: {budget.size} tokens a step")
        lowered = jit_advance.lower(self.model, *arguments, budget=budget, width=self.width)
        if self._store is None:
            return compilers.submit(lowered.compile, _compiler_options())
        return compilers.submit(self._store.compile, key, lowered, _compiler_options())


def _compiler_options() -> dict[str, str | bool]:
    """What compiles a CPU's programs in two thirds of the time: what they take their own time for is native."""
    if jax.default_backend() != "cpu" or jax.__version_info__[:2] != (0, 10):  # later versions know no such option
        return {}
    return {"xla_backend_optimization_level": "1", "xla_cpu_use_fusion_emitters": False}
