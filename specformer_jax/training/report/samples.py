"""Documents as the loss sees them: their text, with the tokens that are forecast marked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from specformer_jax.loading.tokenizer import Tokenizer

COLOURS = ("\x1b[32m", "\x1b[0m")  # green where the terminal shows colours
MARKS = ("[[", "]]")


def masks(batch: Mapping[str, np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The token ids of each document of a batch, and which of them are a label of any slot."""
    for row in range(len(batch["tokens"])):
        labels, anchors = batch["labels"][row], batch["anchors"][row]
        labelled = np.zeros(batch["tokens"].shape[1], bool)
        for slot in range(labels.shape[1]):
            labelled[anchors[labels[:, slot] >= 0] + 2 + slot] = True
        for segment in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == segment
            yield batch["tokens"][row][here], labelled[here]


def samples(batch: Mapping[str, np.ndarray], tokenizer: Tokenizer, *, colours: bool, count: int = 3) -> list[str]:
    """The text of the first documents of a batch, special tokens as they are written, what is forecast marked.

    Args:
      batch: what `Batches` makes.
      tokenizer: the target's.
      colours: whether the marks are a terminal's colours, or else brackets.
      count: how many documents are shown.
    """
    found = itertools.islice(masks(batch), count)
    return [marked(tokens, labelled, tokenizer, COLOURS if colours else MARKS) for tokens, labelled in found]


def marked(tokens: np.ndarray, chosen: np.ndarray, tokenizer: Tokenizer, marks: tuple[str, str] = MARKS) -> str:
    """The text of some tokens, those that are chosen between marks."""
    begin, end = marks
    return "".join(f"{begin}{text}{end}" if among else text for among, text in pieces(tokens, chosen, tokenizer))


def pieces(tokens: np.ndarray, chosen: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[bool, str]]:
    """The text of tokens in runs that are chosen, or are not."""
    for among, run in itertools.groupby(zip(chosen, tokens, strict=True), key=lambda pair: bool(pair[0])):
        yield among, b"".join(tokenizer.token_bytes(int(id)) for _, id in run).decode(errors="replace")
