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
    begin, end = COLOURS if colours else MARKS
    shown = []
    for tokens, labelled in itertools.islice(masks(batch), count):
        text = ""
        for marked, run in itertools.groupby(zip(labelled, tokens, strict=True), key=lambda pair: bool(pair[0])):
            piece = b"".join(tokenizer.token_bytes(int(id)) for _, id in run).decode(errors="replace")
            text += f"{begin}{piece}{end}" if marked else piece
        shown.append(text)
    return shown
