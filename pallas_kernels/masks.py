"""The one mask predicate: the reference and every kernel call this function."""

from __future__ import annotations

import jax


def may_attend(
    q_position: jax.Array,
    k_position: jax.Array,
    *,
    q_segment: jax.Array | None = None,
    k_segment: jax.Array | None = None,
    q_slot: jax.Array | None = None,
    k_slot: jax.Array | None = None,
    bidirectional: bool = True,
) -> jax.Array:
    """Whether a query may attend a key. All arguments broadcast; returns bool of the broadcast shape.

    Every token has an absolute position. A *draft* token also has a slot: slot `j` of the draft block of anchor
    position `p` has position `p` and slot `j`. A query is a plain token or a draft token (the anchor's block reads the
    same context as the anchor itself), a key is a context token (`k_slot=None`) or a draft token.

    Context keys: at or before the query, in the same document (segment), and no query of an empty row (negative
    position) or of padding (segment 0) attends anything. A row that starts at 2, three queries, six cache slots:

                 s  0 1 2 3 4 5
        position 2  x x x . . .
        position 3  x x x x . .
        position 4  x x x x x .

    Packed documents, segments 1 1 2 2 0:

        segment 1   x . . . .
        segment 1   x x . . .
        segment 2   . . x . .
        segment 2   . . x x .
        padding 0   . . . . .

    Draft keys: only those of the same anchor; all slots, or with `bidirectional=False` those up to the query's own.
    Two anchors of three slots:

        bidirectional      x x x . . .      causal      x . . . . .
                           x x x . . .                  x x . . . .
                           x x x . . .                  x x x . . .
                           . . . x x x                  . . . x . .
                           . . . x x x                  . . . x x .
                           . . . x x x                  . . . x x x

    Args:
      q_position: i32, position of the query (of its anchor, for a draft token).
      k_position: i32, position of the key (of its anchor, for a draft token).
      q_segment, k_segment: i32 document numbers from 1, 0 = padding; both or neither.
      q_slot, k_slot: i32 draft slots; `k_slot=None` says that the keys are context.
      bidirectional: whether draft slots see the later ones of their block.
    """
    if k_slot is None:
        allowed = k_position <= q_position
    else:
        allowed = k_position == q_position
        if not bidirectional:
            allowed = allowed & (k_slot <= q_slot)
    allowed = allowed & (q_position >= 0)
    if q_segment is not None:
        allowed = allowed & (q_segment == k_segment) & (q_segment != 0)
    return allowed
