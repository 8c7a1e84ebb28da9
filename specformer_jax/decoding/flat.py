"""A flat batch: the tokens that one call of the target reads, whoever's they are."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Shaped

from pallas_kernels import Places


class Flat(NamedTuple):
    """A flat batch of T places.

    The rows that have places sit in seats, in the order of the rows; a seat's places lie side by side: first committed
    tokens, then drafts.

    Attributes:
      places: where each token stands; its rows are seats.
      token: what is read at each place.
      seats: the row in each seat; B where nobody sits.
      last: the place of each seat's last committed token in the batch.
      drafts: how many drafts follow it.
      asks: whether it is the row's last committed token, so that the next one is asked for.
      reads: how many committed tokens the seat reads.
    """

    places: Places
    token: Int32[Array, " T"]
    seats: Int32[Array, " S"]
    last: Int32[Array, " S"]
    drafts: Int32[Array, " S"]
    asks: Bool[Array, " S"]
    reads: Int32[Array, " S"]

    def asking(self, width: int) -> Int32[Array, "S {width}"]:
        """The places of each seat's last committed token and of the width - 1 after it; who has fewer ignores them."""
        return jnp.minimum(self.last[:, None] + jnp.arange(width), len(self.token) - 1)

    def drafted(self, width: int) -> Bool[Array, "S {width}"]:
        """Whether a draft of each seat is read at each slot."""
        return jnp.arange(width) < self.drafts[:, None]

    def seated(self, x: Shaped[Array, " B *shape"]) -> Shaped[Array, " S *shape"]:
        """What x holds for the row in each seat; 0 where nobody sits."""
        return x.at[self.seats].get(mode="fill", fill_value=0)

    def following(self, tokens: Int32[Array, "B C"]) -> Int32[Array, " T"]:
        """The row's token after each place; after what was rejected, whatever stands there."""
        columns = jnp.minimum(self.places.position + 1, tokens.shape[1] - 1)
        return tokens.at[self.seats[self.places.row], columns].get(mode="fill", fill_value=0)
