"""Flat batches over a paged cache: what the pages are and where the tokens stand."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

Array = jax.Array
Pages = tuple[Float[Array, "P K p H"], Float[Array, "P K p H"]]  # keys and values; p positions a page


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where the tokens of a flat batch stand.

    The tokens of a row lie side by side in the order of their positions, without a gap between two positions. Trees of
    other things than arrays take this structure too (shapes, shardings), so no type is checked here.

    Attributes:
      row: i32[T], the row of each token; anything for a token that is nobody's.
      position: i32[T], its absolute position in the row; negative marks a token that is nobody's.
      table: i32[B, tables], the pages that hold each row, in the order of its positions.
      longest: static; no row has more tokens in the batch. None where that is not known.
      shards: static; in so many equal parts of the batch are only tokens of the same part of the rows, whose pages lie
        in the same part of the cache: what a mesh may split.
    """

    row: Any
    position: Any
    table: Any
    longest: int | None = dataclasses.field(default=None, metadata={"static": True})
    shards: int = dataclasses.field(default=1, metadata={"static": True})

    def windowed(self, window: int, p: int) -> Places:
        """The same tokens in rows that begin later, with the first page that a row's first token needs for a window.

        Attention over these places reads of each row the last `window` positions up to its first token here, what
        precedes them on their page, and the tokens that follow. What is written lands where it did before.

        Args:
          window: how many positions a row's first token shall attend to, itself counted.
          p: positions of a page.

        Returns:
          The places, whose tables are no longer than the window needs, with tokens past a row's last page, which write
          nothing, as nobody's. These very places where no row is longer than the window.
        """
        seats, tables = self.table.shape
        if tables * p <= window:
            return self
        alive = (self.position >= 0) & (self.position < tables * p)
        begins = jnp.full(seats, tables * p).at[jnp.where(alive, self.row, seats)].min(self.position, mode="drop")
        table, skipped = nearest_pages(self.table, begins, window, self.longest, p)
        position = self.position - skipped.at[self.row].get(mode="clip") * p
        return dataclasses.replace(self, position=jnp.where(alive, position, -1), table=table)


def nearest_pages(
    table: Int[Array, "B tables"], begins: Int[Array, " B"], window: int, longest: int | None, p: int
) -> tuple[Int[Array, "B kept"], Int[Array, " B"]]:
    """The pages of each row from the one on in which the window of a token begins.

    >>> pages, skipped = nearest_pages(jnp.array([[4, 2, 7, 5]]), jnp.array([40]), window=8, longest=1, p=16)
    >>> pages.tolist(), skipped.tolist()
    ([[7, 5]], [2])

    Args:
      table: the pages that hold each row, in the order of its positions.
      begins: the position of that token, the first of those that read.
      window: how many positions it shall attend to, itself counted.
      longest: how many tokens follow one another there, it counted; None where that is not known.
      p: positions of a page.

    Returns:
      The pages, no more than the window and those tokens need, and how many precede them in each row.
    """
    tables = table.shape[1]
    skipped = jnp.maximum(begins - window + 1, 0) // p
    kept = tables if longest is None else min(tables, -(-(window + longest + p - 2) // p))
    return jnp.take_along_axis(table, skipped[:, None] + jnp.arange(kept), axis=1, mode="clip"), skipped
