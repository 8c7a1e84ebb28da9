"""Flat batches over a paged cache: what the pages are and where the tokens stand."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Float

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
