"""Grammars over the tiny model's letters, written a second time as automata, and what plain decoding makes of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from specformer_jax.grammars import grammar
from tests import tiny

[END] = tiny.CONFIG.eos_ids


class Automaton(NamedTuple):
    """A grammar, and the same as states: what each letter leads to, and where an answer may end."""

    grammar: str
    steps: dict[int, dict[str, int]]
    ends: set[int]

    def allowed(self, answer: list[int]) -> list[int]:
        """The tokens that may come after an answer."""
        state = 0
        for token in answer:
            state = self.steps[state][chr(ord("a") + token)]
        letters = [ord(letter) - ord("a") for letter in self.steps.get(state, {})]
        return letters + [END] * (state in self.ends)


def several(least: int, most: int) -> Automaton:
    """So many of a, b and c, then perhaps f or gh."""
    steps: dict[int, dict[str, int]] = {n: dict.fromkeys("abc", n + 1) for n in range(most)} | {most: {}}
    for n in range(least, most + 1):
        steps[n] |= {"f": 100, "g": 101}
    text = grammar.of_regex(f"[abc]{{{least},{most}}}(f|gh)?")
    return Automaton(text, steps | {101: {"h": 100}}, {*range(least, most + 1), 100})


AUTOMATA = [
    Automaton(grammar.of_regex("(ab|c)*e"), {0: {"a": 1, "c": 0, "e": 2}, 1: {"b": 0}}, {2}),
    several(3, 9),
    # abba, abbc, cab
    Automaton(
        grammar.of_choice(["abba", "abbc", "cab"]),
        {0: {"a": 1, "c": 5}, 1: {"b": 2}, 2: {"b": 3}, 3: {"a": 4, "c": 4}, 5: {"a": 6}, 6: {"b": 4}},
        {4},
    ),
]


def naive(lm, prompt, params, automaton: Automaton) -> list[int]:
    """Plain decoding without cache, window or batch, among the tokens that are allowed."""
    new: list[int] = []
    while len(new) < params.max_new_tokens and (not new or new[-1] != END):
        logits = tiny.next_logits(lm.model, lm.params, [*prompt, *new])
        allowed = automaton.allowed(new)
        logits[np.setdiff1d(np.arange(len(logits)), allowed)] = -np.inf
        new.append(tiny.choose(tiny.processed(logits, params, prompt, new), params, len(prompt) + len(new)))
    return new
