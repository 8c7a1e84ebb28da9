"""The one mask predicate: the reference and every kernel call this function."""

from __future__ import annotations

from jaxtyping import Array, Bool, Int


def may_attend(
    q_position: Int[Array, "*#shape"],
    k_position: Int[Array, "*#shape"],
    *,
    q_segment: Int[Array, "*#shape"] | None = None,
    k_segment: Int[Array, "*#shape"] | None = None,
    q_slot: Int[Array, "*#shape"] | None = None,
    k_slot: Int[Array, "*#shape"] | None = None,
    bidirectional: bool = True,
) -> Bool[Array, "*allowed"]:
    """Whether a query may attend a key. All arguments broadcast, and the result is as large as those that it needs.

    Every token has an absolute position. A *draft* token also has a slot: slot `j` of the draft block of anchor
    position `p` has position `p` and slot `j`. A query is a plain token or a draft token (the anchor's block reads the
    same context as the anchor itself), a key is a context token (`k_slot=None`) or a draft token.

    Context keys: at or before the query, in the same document (segment), and no query of an empty row (negative
    position) or of padding (segment 0) attends anything. Three queries from position 2 on, six positions of the cache:

                    0 1 2 3 4 5
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
      q_position: the position of the query; for a draft token, that of its anchor.
      k_position: the position of the key; for a draft token, that of its anchor.
      q_segment, k_segment: the numbers of their documents, from 1, where 0 is padding; both or neither.
      q_slot, k_slot: their draft slots; `k_slot=None` says that the keys are context.
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
