"""What documents hold for training: the positions that forecast, and all that does not fit into a packed row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from specformer_jax.batch.omissions import Omission
from specformer_jax.training.data.documents import Document


@dataclasses.dataclass
class Contents:
    """What there is, counted before anything is cut or left out.

    Attributes:
      answers: the answers of all documents.
      tokens: the tokens of all documents.
      answer_tokens: those of them that are answers.
      sizes: of each document the tokens that fit into a row, and how many of them forecast.
      omissions: what is cut or left out.
    """

    answers: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    omissions: list[Omission] = dataclasses.field(default_factory=list)


def examine(documents: Iterable[Document], length: int, anchors: int) -> Contents:
    """Counts what documents hold, for rows of so many tokens and so many anchors."""
    found = Contents()
    for document in documents:
        lengths = [end - begin for begin, end in document.answers]
        found.answers += len(lengths)
        found.tokens += len(document.tokens)
        found.answer_tokens += sum(lengths)
        forecasting = len(anchors_of(document, length)[0])
        found.sizes.append((min(len(document.tokens), length), min(forecasting, anchors)))
        found.omissions += _left_out(document, length, forecasting, anchors)
    return found


def _left_out(document: Document, length: int, forecasting: int, anchors: int) -> list[Omission]:
    if not forecasting:
        return [Omission(document.id, "row", 1, f"no answer of two tokens within the {length} of a packed row")]
    short = sum(min(end, length) - begin < 2 for begin, end in document.answers)
    parts = (
        ("answer", short, f"fewer than two tokens within the {length} of a packed row"),
        ("token", len(document.tokens) - length, f"beyond the {length} of a packed row (sequence_length)"),
        ("token", forecasting - anchors, f"beyond the {anchors} that forecast in a packed row (anchors)"),
    )
    return [Omission(document.id, part, count, reason) for part, count, reason in parts if count > 0]


def anchors_of(document: Document, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The positions of a document's first tokens, so many, that forecast, and for each where its answer ends.

    >>> anchors_of(Document("a", np.arange(12), ((2, 6), (9, 12)), 0.0), 12)
    (array([1, 2, 3, 8, 9]), array([ 6,  6,  6, 12, 12]))
    """
    spans = [(begin - 1, min(end, length)) for begin, end in document.answers]
    anchors = [np.arange(first, max(end - 2, first)) for first, end in spans]
    ends = [np.full(len(some), end) for some, (_, end) in zip(anchors, spans, strict=True)]
    return np.concatenate(anchors), np.concatenate(ends)
