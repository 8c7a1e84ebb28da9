"""What a thinking model thinks before it answers: <think> ... </think>, as Qwen3 and DeepSeek-R1's pupils write it."""

from __future__ import annotations

from specformer_jax.server.parsing.reader import Source, Steps, Thought, skip_space, until

OPEN, CLOSE = "<think>", "</think>"


def thoughts(source: Source, inside: bool) -> Steps[None]:
    """Reads the thoughts that an answer begins with, if it does.

    Args:
      source: the answer.
      inside: whether the prompt has opened them already.
    """
    if not inside:
        while not source.ended and OPEN.startswith(source.text.lstrip()[: len(OPEN)]) and OPEN not in source.text:
            yield None
        if not source.text.lstrip().startswith(OPEN):
            return
        source.take(source.text.index(OPEN) + len(OPEN))
    yield from skip_space(source)
    yield from until(source, CLOSE, Thought)
    yield from skip_space(source)
