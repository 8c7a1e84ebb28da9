"""How mixed-mask attention is cut into tiles: shared by the TPU and GPU bodies, all of it plain jnp.

A query tile is a few anchors. Its rows are every (anchor, draft slot, query head of the group), so that one key/value
head meets its whole group of query heads in one product; they are padded to what a chip can tile. A context tile is a
few positions of the cache, in a paged cache those of a few pages or a part of one. A draft tile is the draft keys of a
query tile's anchors, padded likewise.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.masks import may_attend

# Keys and values.
Context = tuple[Float[Array, "B K C H"], Float[Array, "B K C H"]]
Draft = tuple[Float[Array, "B T *J K H"], Float[Array, "B T *J K H"]]

MASKED = -1e30  # a masked score
FLOOR = -1e29  # where the running maximum starts: exp(MASKED - FLOOR) is 0, so masked rows sum to 0 without a select


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static facts of one attention call.

    Attributes:
      B, T, J, N, K, H, C: sizes by their letters; J = 1 for plain queries, C = 0 without a context.
      draft: whether there is a draft block.
      segments: whether documents are packed.
      bidirectional: whether draft slots see the later ones of their block.
      anchors: how many anchors a query tile holds.
      positions: how many positions of the cache a context tile holds; in pages, a multiple of p or a divisor.
      p: how many positions a page holds, 0 where the context is not paged.
      power_of_two: whether the sizes of tiles have to be powers of two (Triton).
      least_rows: how many rows a query tile is padded to at least.
    """

    B: int
    T: int
    J: int
    N: int
    K: int
    H: int
    C: int
    draft: bool
    segments: bool
    bidirectional: bool
    anchors: int
    positions: int
    p: int = 0
    power_of_two: bool = False
    least_rows: int = 16

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.N // self.K

    @property
    def scale(self) -> float:
        """What the scores are multiplied with."""
        return self.H**-0.5

    @property
    def per_anchor(self) -> int:
        """Query rows of an anchor."""
        return self.J * self.group

    @property
    def rows(self) -> int:
        """Rows of a query tile."""
        return max(self.least_rows, self._pad(self.anchors * self.per_anchor))

    @property
    def drafts(self) -> int:
        """Draft keys of a draft tile."""
        return self._pad(self.anchors * self.J)

    @property
    def query_tiles(self) -> int:
        return -(-self.T // self.anchors)

    @property
    def context_tiles(self) -> int:
        return max(1, -(-self.C // self.positions))

    @property
    def tile_pages(self) -> int:
        """Pages of a context tile, where it holds whole ones."""
        return self.positions // self.p

    @property
    def padded_H(self) -> int:
        """Head size of the folded operands; the context, which is not copied, keeps H."""
        return self._pad(self.H) if self.power_of_two else self.H

    def _pad(self, n: int) -> int:
        return max(16, 1 << (n - 1).bit_length()) if self.power_of_two else -(-n // 16) * 16


class Prefetched(NamedTuple):
    """What a TPU knows before the first tile: arrays, or refs inside a kernel and its block specs.

    Attributes:
      start: the position of each row's first anchor.
      first, last: the tiles of the inner axis that each tile of the outer one meets.
      table: the pages of each row; None where the context is not paged.
    """

    start: Any
    first: Any
    last: Any
    table: Any

    def at(self, b, outer) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Start, first and last for one tile of a row."""
        return self.start[b], self.first[b, outer], self.last[b, outer]


class AttentionOperands(NamedTuple):
    """What every pass reads, None for what a call does without: arrays, their block specs, or refs inside a kernel.

    Attributes:
      q: the folded queries.
      k, v: keys and values of the context; on TPU, paged, once for each page of a context tile.
      q_segment, k_segment: documents of the query rows and of the context's positions.
      draft_k, draft_v: the folded keys and values of the draft block.
    """

    q: Any
    k: Any
    v: Any
    q_segment: Any
    k_segment: Any
    draft_k: Any
    draft_v: Any

    def specs(self, of: dict[str, Any]) -> AttentionOperands:
        """The block specs of the operands that are there, from those `of` each kind."""
        kinds = AttentionOperands("q", "context", "context", "q_segment", "k_segment", "draft", "draft")
        return AttentionOperands(*(None if x is None else of[kind] for x, kind in zip(self, kinds, strict=True)))


class Incoming(NamedTuple):
    """What the backward pass reads besides the operands.

    Attributes:
      dout: the gradient of the folded output.
      sums: the log-sum-exp of every query row.
      delta: sum over the head of dout * out, of every query row.
    """

    dout: Any
    sums: Any
    delta: Any


def operands(plan: Tiling, q, context, draft, segments) -> AttentionOperands:
    """The operands of a pass: q and draft are folded, segments are not."""
    k, v = context or (None, None)
    draft_k, draft_v = draft or (None, None)
    if segments is None:
        return AttentionOperands(q, k, v, None, None, draft_k, draft_v)
    return AttentionOperands(q, k, v, fold_segments(plan, segments), segments[:, None], draft_k, draft_v)


def like(arrays):
    """The shapes and dtypes of arrays, for results that are as they are."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)


def _pad_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def fold(plan: Tiling, x: Float[Array, "B T J N H"]) -> Float[Array, "B K query_rows padded_H"]:
    """The rows of all query tiles, one tile after the other; padding is zero."""
    p = plan
    x = _pad_axis(x, 1, p.query_tiles * p.anchors).reshape(p.B, p.query_tiles, p.anchors, p.J, p.K, p.group, p.H)
    x = x.transpose(0, 4, 1, 2, 3, 5, 6).reshape(p.B, p.K, p.query_tiles, p.anchors * p.per_anchor, p.H)
    return _pad_axis(_pad_axis(x, 3, p.rows), 4, p.padded_H).reshape(p.B, p.K, p.query_tiles * p.rows, p.padded_H)


def unfold(plan: Tiling, x: Float[Array, "B K query_rows padded_H"]) -> Float[Array, "B T J N H"]:
    """The inverse of `fold`."""
    p = plan
    x = x.reshape(p.B, p.K, p.query_tiles, p.rows, p.padded_H)[:, :, :, : p.anchors * p.per_anchor, : p.H]
    x = x.reshape(p.B, p.K, p.query_tiles, p.anchors, p.J, p.group, p.H).transpose(0, 2, 3, 4, 1, 5, 6)
    return x.reshape(p.B, p.query_tiles * p.anchors, p.J, p.N, p.H)[:, : p.T]


def fold_draft(plan: Tiling, x: Float[Array, "B T J K H"]) -> Float[Array, "B K draft_rows padded_H"]:
    """The keys or values of all draft tiles, one tile after the other; padding is zero."""
    p = plan
    x = _pad_axis(x, 1, p.query_tiles * p.anchors).reshape(p.B, p.query_tiles, p.anchors * p.J, p.K, p.H)
    x = x.transpose(0, 3, 1, 2, 4)
    return _pad_axis(_pad_axis(x, 3, p.drafts), 4, p.padded_H).reshape(p.B, p.K, p.query_tiles * p.drafts, p.padded_H)


def fold_segments(plan: Tiling, segments: Int[Array, "B T"]) -> Int[Array, "B query_tiles 1 rows"]:
    """The segment of every query row, 0 in padding."""
    p = plan
    x = _pad_axis(segments, 1, p.query_tiles * p.anchors).reshape(p.B, p.query_tiles, p.anchors)
    return _pad_axis(jnp.repeat(x, p.per_anchor, axis=2), 2, p.rows)[:, :, None]


def fold_sums(plan: Tiling, x: Float[Array, "B K query_rows"]) -> Float[Array, "B K query_tiles 1 rows"]:
    """How numbers of query rows are kept: along the lanes."""
    return x.reshape(plan.B, plan.K, plan.query_tiles, 1, plan.rows)


def tile_meets(
    plan: Tiling, start: Int[Array, " B"], segments: Int[Array, "B T"] | None
) -> Bool[Array, "B query_tiles context_tiles"]:
    """Whether any query of a tile may attend any position of a context tile (never wrongly False)."""
    p = plan
    furthest = jnp.minimum((jnp.arange(p.query_tiles) + 1) * p.anchors, p.T) - 1  # the last anchor of each tile
    last = start[:, None] + furthest
    last = jnp.where(start[:, None] < 0, -1, last)
    meets = jnp.arange(p.context_tiles) * p.positions <= last[:, :, None]
    if segments is not None:
        q_low, q_high = _segment_range(segments, p.query_tiles, p.anchors)
        k_low, k_high = _segment_range(segments, p.context_tiles, p.positions)
        meets = meets & (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    return meets


def _segment_range(segments: jax.Array, tiles: int, size: int) -> tuple[jax.Array, jax.Array]:
    """The smallest and largest segment number in each tile, padding aside: an empty range where all is padding."""
    x = _pad_axis(segments, 1, tiles * size).reshape(-1, tiles, size)
    return jnp.where(x == 0, jnp.iinfo(jnp.int32).max, x).min(axis=2), x.max(axis=2)


def spans(meets: Bool[Array, "B tiles others"]) -> tuple[Int[Array, "B tiles"], Int[Array, "B tiles"]]:
    """The first and the last of the other tiles that a tile meets; (0, -1) where none is."""
    some = meets.any(axis=2)
    first = jnp.where(some, jnp.argmax(meets, axis=2), 0)
    last = jnp.where(some, meets.shape[2] - 1 - jnp.argmax(meets[:, :, ::-1], axis=2), -1)
    return first.astype(jnp.int32), last.astype(jnp.int32)


# What follows runs inside kernel bodies: `axis` is the axis of the tile along which the index runs.


def _index(size: int, axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis)


def query_places(plan: Tiling, start: jax.Array, tile: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The position (-1 in padding and empty rows) and the draft slot of every query row of a tile."""
    r = _index(plan.rows, axis)
    anchor = jax.lax.div(r, plan.per_anchor)
    slot = jax.lax.div(r - anchor * plan.per_anchor, plan.group)
    offset = tile * plan.anchors + anchor
    real = (anchor < plan.anchors) & (offset < plan.T) & (start >= 0)
    return jnp.where(real, start + offset, -1), slot


def context_mask(plan: Tiling, q_position, tile, axis: int, q_segment=None, k_segment=None) -> jax.Array:
    """Which query rows may attend which positions of a context tile; `axis` is that of the positions."""
    k_position = tile * plan.positions + _index(plan.positions, axis)
    allowed = may_attend(q_position, k_position, q_segment=q_segment, k_segment=k_segment)
    return allowed & (k_position < plan.C)


def draft_mask(plan: Tiling, q_position, q_slot, start, tile) -> jax.Array:
    """Which query rows may attend which draft keys of their tile."""
    c = _index(plan.drafts, 1)
    anchor = jax.lax.div(c, plan.J)
    k_position = jnp.where(anchor < plan.anchors, start + tile * plan.anchors + anchor, -2)
    k_slot = c - anchor * plan.J
    return may_attend(q_position, k_position, q_slot=q_slot, k_slot=k_slot, bidirectional=plan.bidirectional)


def positions_alive(plan: Tiling, start, tile, k_segment=None) -> Bool[Array, "positions 1"]:
    """The positions of a context tile that some query of the row may attend; the rest may hold anything."""
    position = tile * plan.positions + _index(plan.positions, 0)
    alive = (position < plan.C) & (position < start + plan.T)
    return alive if k_segment is None else alive & (k_segment != 0)
