"""What an answer took, in OpenAI's words and ours."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from specformer_jax.decoding.pass_counts import PassCounts
from specformer_jax.engine.request import Usage


def speculation(usage: Usage) -> dict[str, Any] | None:
    """What drafts did for a choice, in vLLM's words (its `metrics.speculative_decoding`); None without drafts.

    Here `num_spec_steps` are all passes that decoded the answer: a row that drafts nothing in one may in the next.
    """
    accepted, steps = usage.accepted_per_position, usage.steps
    if not accepted or not steps:
        return None
    # Drafts are accepted from the first on, so a pass that accepted j of them accepted those at 0 to j - 1.
    reached = [steps, *accepted, 0]
    return {
        "mean_acceptance_length": 1 + sum(accepted) / steps,
        "draft_acceptance_rate": sum(accepted) / max(usage.drafted_tokens, 1),
        "acceptance_histogram": [more - fewer for more, fewer in itertools.pairwise(reached)],
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": sum(accepted),
        "num_draft_tokens": usage.drafted_tokens,
        "num_spec_tokens": len(accepted),
    }


def total_usage(usages: Sequence[Usage], choices_per_prompt: int) -> dict[str, Any]:
    """OpenAI's usage of an answer, with what speculation did.

    Args:
      usages: what each choice took, the choices of a prompt one after the other; a prompt's tokens count once.
      choices_per_prompt: how many choices each prompt has.
    """
    firsts = usages[::choices_per_prompt]
    prompt, completion = sum(u.prompt_tokens for u in firsts), sum(u.completion_tokens for u in usages)
    passes = PassCounts.total([u.passes for u in usages])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in firsts)},
        "kappa": round(passes.kappa, 4),
        "steps": passes.steps,
        "drafted_tokens": sum(u.drafted_tokens for u in usages),
        "accepted_tokens": int(passes.accepted.sum()),
        "accepted_per_position": passes.accepted.tolist(),
    }
