"""Documents -> packed global batches, the same for any number of hosts.

Which documents share a packed row, and which rows a batch, follows from the documents' lengths, the seed and the epoch
alone. Batch i is a function of i: each host reads its rows of it, and the iterator's state is one number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from specformer_jax.errors import UserError
from specformer_jax.training.data.contents import anchors_of, examine
from specformer_jax.training.data.documents import Document

OPEN_ROWS = 16  # rows that first-fit packing may still add to


class Batches:
    """Packed batches by number; a random-access source for grain.

    Batch i holds this host's share of its rows, as these arrays (R rows of T tokens, A anchors each, J slots):

      tokens    i32[R, T]        the documents of each row, one after the other
      segments  i32[R, T]        which document of its row a token belongs to, from 1; 0 is padding
      anchors   i32[R, A]        positions that forecast; unused ones are 0 and have no label
      labels    i32[R, A, J]     the token that each slot of an anchor should forecast, -1 where there is none
      hooks     u16[R, T, G, D]  bits of the target's bfloat16 hooks, only where a store of hooks is given

    `contents` counts what the documents hold, and what of it is left out.

    An anchor t is a position whose next token t + 1 belongs to an answer; slot j is labelled with token t + 2 + j of
    the same answer.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        slots: int,
        sequence_length: int,
        rows: int,
        anchors: int | None = None,
        seed: int = 0,
        share: Sequence[int] | None = None,
        hooks: Callable[[int], np.ndarray] | None = None,
    ):
        """
        Args:
          documents: what is trained on, by random access; answers of one token are left out.
          slots: J, the slots that each anchor has labels for.
          sequence_length: T, the tokens of a packed row; longer documents are cut.
          rows: how many rows the global batch has.
          anchors: A, the most anchors of a row; None allows T of them.
          seed: decides the order of the documents in each epoch.
          share: which of these rows this host's batches hold (`placement.host_rows`); None takes all.
          hooks: gives the stored hooks u16[n, G, D] of a document by its number.

        Raises:
          UserError: no document has an answer long enough to train on.
        """
        self._documents, self._hooks = documents, hooks
        self._slots, self._length, self._rows = slots, sequence_length, rows
        self._anchors, self._seed = anchors or sequence_length, seed
        self._share = range(rows) if share is None else share
        self.contents = examine(documents, sequence_length, self._anchors)
        self._sizes = self.contents.sizes
        self._usable = np.array([i for i, (size, n) in enumerate(self._sizes) if n >= 1], np.int64)
        if not len(self._usable):
            raise UserError("no document of the data has an answer of two tokens within the sequence length")
        self._starts = [0]  # first batch of each epoch planned so far

    def epoch(self) -> tuple[int, int]:
        """How many packed rows the first epoch has, with those that fill up its last batch, and tokens in them."""
        plan = self._plan(0)
        return len(plan), sum(self._sizes[i][0] for row in plan for i in row)

    def __len__(self) -> int:
        return 2**31 - 1  # epochs follow each other without an end

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch = 0
        while True:  # epochs differ in their number of batches, so the earlier ones are planned too
            if epoch + 1 == len(self._starts):
                self._starts.append(self._starts[-1] + len(self._plan(epoch)) // self._rows)
            if index < self._starts[epoch + 1]:
                break
            epoch += 1
        first = (index - self._starts[epoch]) * self._rows
        plan = self._plan(epoch)
        rows = [self._row(plan[first + r]) for r in self._share]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one source a run
    def _plan(self, epoch: int) -> list[list[int]]:
        """Which documents each packed row of an epoch holds: first fit among the rows still open, in shuffled order."""
        order = np.random.default_rng((self._seed, epoch)).permutation(self._usable)
        closed: list[list[int]] = []
        opened: list[tuple[list[int], int, int]] = []
        for i in order.tolist():
            size, anchors = self._sizes[i]
            for place, (row, tokens, used) in enumerate(opened):
                if tokens + size <= self._length and used + anchors <= self._anchors:
                    opened[place] = ([*row, i], tokens + size, used + anchors)
                    break
            else:
                opened.append(([i], size, anchors))
                if len(opened) > OPEN_ROWS:
                    closed.append(opened.pop(0)[0])
        closed += [row for row, *_ in opened]
        # The last batch is filled up with rows of the same epoch: row r of it repeats packed row r, few ones in turns.
        packed = len(closed)
        for number in range(packed % self._rows or self._rows, self._rows):
            closed.append(closed[number % packed])
        return closed

    def _row(self, members: list[int]) -> dict[str, np.ndarray]:
        T, A, J = self._length, self._anchors, self._slots
        row: dict[str, Any] = {
            "tokens": np.zeros(T, np.int32),
            "segments": np.zeros(T, np.int32),
            "anchors": np.zeros(A, np.int32),
            "labels": np.full((A, J), -1, np.int32),
        }
        at = used = 0
        for segment, i in enumerate(members, 1):
            document, (size, count) = self._documents[i], self._sizes[i]
            row["tokens"][at : at + size] = document.tokens[:size]
            row["segments"][at : at + size] = segment
            anchors, ends = (x[:count] for x in anchors_of(document, size))
            ahead = anchors[:, None] + 2 + np.arange(J)
            labels = np.where(ahead < ends[:, None], document.tokens[np.minimum(ahead, size - 1)], -1)
            row["anchors"][used : used + count] = at + anchors
            row["labels"][used : used + count] = labels
            if self._hooks is not None:
                stored = self._hooks(i)
                hooks = row.setdefault("hooks", np.zeros((T, *stored.shape[1:]), np.uint16))
                hooks[at : at + size] = stored[:size]
            at, used = at + size, used + count
        return row


def iterate_batches(source: Batches, prefetch: int = 2) -> grain.DatasetIterator:
    """Batches in order, read ahead by threads; `get_state` and `set_state` of the iterator resume it exactly."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))
