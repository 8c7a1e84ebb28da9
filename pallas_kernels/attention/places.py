"""Flat batches over a paged cache: what the pages are and where the tokens stand."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int32

Pages = tuple[Float[Array, "P K p H"], Float[Array, "P K p H"]]  # keys and values; p positions a page


class Places(NamedTuple):
    """Where the tokens of a flat batch stand.

    The tokens of a row lie side by side in the order of their positions, without a gap between two positions.

    Attributes:
      row: the row of each token; anything for a token that is nobody's.
      position: its absolute position in the row; negative marks a token that is nobody's.
      table: the pages that hold each row, in the order of its positions.
    """

    row: Int32[Array, " T"]
    position: Int32[Array, " T"]
    table: Int32[Array, "B tables"]
