"""Where the tokens of a flat batch stand, and the pages of a cache that they are written to."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jaxtyping import Float, Int32

Array = jax.Array
Pages = tuple[Float[Array, "P K p H"], Float[Array, "P K p H"]]
"""Keys and values of a layer, p positions a page."""


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
