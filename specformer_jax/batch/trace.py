"""What each target pass of one answer drafted, accepted and committed: one pass at a time, to be looked at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax

from specformer_jax.batch import generation
from specformer_jax.batch.row_batch import run_steps, start_batch
from specformer_jax.config import SamplingParams
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel


class Pass(NamedTuple):
    """One target pass over an answer; the first one stands for those that read the prompt.

    Attributes:
      drafts: the ids of the chain that the pass verified; () in the first and where a lookup found nothing.
      tokens: the ids that the pass committed: the accepted drafts and then the target's own token.
    """

    drafts: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def accepted(self) -> int:
        """How many of `tokens` were drafts.

        >>> Pass(drafts=(5, 6, 7), tokens=(5, 6, 9)).accepted
        2
        """
        pairs = zip(self.drafts, self.tokens, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def trace(
    lm: LanguageModel,
    prompt: Sequence[int],
    sampling_params: SamplingParams = SamplingParams(),
    *,
    draft_length: int | None = None,
) -> list[Pass]:
    """Answers one prompt with a host round trip after every pass, so that each can be seen.

    Args:
      lm: the model, as `load` returns it.
      prompt: the token ids of the prompt.
      sampling_params: how to sample.
      draft_length: how many drafts a step has; None chooses by itself.

    Returns:
      The passes in order; their `tokens` one after the other are the answer.

    Raises:
      UserError: the draft length is out of range, the prompt is empty or longer than the context, or drafts are
        verified in another way than exactly: then tokens do not tell which drafts were accepted.
    """
    lm.model.verification.require_exact("a trace")
    generation.check_draft_length(lm, draft_length)
    if reason := generation.misfit(len(prompt), lm.config.context):
        raise UserError(reason)
    k, shape, lm = generation.plan_job(lm, [len(prompt)], sampling_params, draft_length=draft_length, batch_size=1)
    state = start_batch(lm, [prompt], sampling_params, shape, k)
    passes: list[Pass] = []
    drafts, seen = (), len(prompt)
    while True:
        tokens, known, done, chain = jax.device_get((state.tokens, state.known, state.done, state.drafts))
        passes.append(Pass(drafts, tuple(tokens[0, seen : known[0]].tolist())))
        if done[0]:
            return passes
        drafts, seen = tuple(id for id in chain[0, :k].tolist() if id >= 0), known[0]
        state = run_steps(lm, state, 1, shape, k)
