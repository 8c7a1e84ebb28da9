"""How mixed-mask attention is cut into tiles: shared by the TPU and GPU bodies, all of it plain jnp.

A query tile is `bt` anchors. Its rows are every (anchor, draft slot, query head of the group), so that one key/value
head meets its whole query group in one product; they are padded to `rows`, which a chip can tile. A context tile is
`bs` cache slots. A draft tile is the draft keys of the same `bt` anchors, padded to `drafts`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.masks import may_attend

MASKED = -1e30  # a masked score
FLOOR = -1e29  # where the running maximum starts: exp(MASKED - FLOOR) is 0, so masked rows sum to 0 without a select


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static facts of one attention call.

    Attributes:
      B, T, J, N, K, H, S: sizes; J = 1 for plain queries, S = 0 without a context.
      draft, segments: whether there is a draft block, whether documents are packed.
      bidirectional: whether the draft block is.
      scale: of the scores.
      bt, bs: anchors in a query tile, slots in a context tile.
      power_of_two: whether tiles have to be (Triton).
    """

    B: int
    T: int
    J: int
    N: int
    K: int
    H: int
    S: int
    draft: bool
    segments: bool
    bidirectional: bool
    scale: float
    bt: int
    bs: int
    power_of_two: bool = False

    @property
    def G(self) -> int:
        return self.N // self.K

    @property
    def rows(self) -> int:
        return self._pad(self.bt * self.J * self.G)

    @property
    def drafts(self) -> int:
        return self._pad(self.bt * self.J)

    @property
    def nt(self) -> int:
        return -(-self.T // self.bt)

    @property
    def ns(self) -> int:
        return max(1, -(-self.S // self.bs))

    @property
    def Hp(self) -> int:
        """Head size of the folded operands; the context, which is not copied, keeps H."""
        return self._pad(self.H) if self.power_of_two else self.H

    def _pad(self, n: int) -> int:
        return max(16, 1 << (n - 1).bit_length()) if self.power_of_two else -(-n // 16) * 16


def _pad_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def fold(plan: Tiling, x: jax.Array) -> jax.Array:
    """[B, T, J, N, H] -> [B, K, nt * rows, Hp]; padding is zero."""
    p = plan
    x = _pad_axis(x, 1, p.nt * p.bt).reshape(p.B, p.nt, p.bt, p.J, p.K, p.G, p.H)
    x = x.transpose(0, 4, 1, 2, 3, 5, 6).reshape(p.B, p.K, p.nt, p.bt * p.J * p.G, p.H)
    return _pad_axis(_pad_axis(x, 3, p.rows), 4, p.Hp).reshape(p.B, p.K, p.nt * p.rows, p.Hp)


def unfold(plan: Tiling, x: jax.Array) -> jax.Array:
    """[B, K, nt * rows, Hp] -> [B, T, J, N, H]."""
    p = plan
    x = x.reshape(p.B, p.K, p.nt, p.rows, p.Hp)[:, :, :, : p.bt * p.J * p.G, : p.H]
    x = x.reshape(p.B, p.K, p.nt, p.bt, p.J, p.G, p.H).transpose(0, 2, 3, 4, 1, 5, 6)
    return x.reshape(p.B, p.nt * p.bt, p.J, p.N, p.H)[:, : p.T]


def fold_draft(plan: Tiling, x: jax.Array) -> jax.Array:
    """[B, T, J, K, H] -> [B, K, nt * drafts, Hp]; padding is zero."""
    p = plan
    x = _pad_axis(x, 1, p.nt * p.bt).reshape(p.B, p.nt, p.bt * p.J, p.K, p.H).transpose(0, 3, 1, 2, 4)
    return _pad_axis(_pad_axis(x, 3, p.drafts), 4, p.Hp).reshape(p.B, p.K, p.nt * p.drafts, p.Hp)


def fold_segments(plan: Tiling, segments: jax.Array) -> jax.Array:
    """i32[B, T] -> i32[B, nt, 1, rows]: the segment of every query row, 0 in padding."""
    p = plan
    x = _pad_axis(segments, 1, p.nt * p.bt).reshape(p.B, p.nt, p.bt)
    return _pad_axis(jnp.repeat(x, p.J * p.G, axis=2), 2, p.rows)[:, :, None]


def fold_sums(plan: Tiling, x: jax.Array) -> jax.Array:
    """f32[B, K, nt * rows] -> f32[B, K, nt, 1, rows]: how per-row numbers are kept, along the lanes."""
    return x.reshape(plan.B, plan.K, plan.nt, 1, plan.rows)


def tile_meets(plan: Tiling, start: jax.Array, segments: jax.Array | None) -> jax.Array:
    """bool[B, nt, ns]: whether any query of a tile may attend any slot of a context tile (never wrongly False)."""
    p = plan
    last = start[:, None] + jnp.minimum((jnp.arange(p.nt) + 1) * p.bt, p.T) - 1  # the tile's furthest anchor
    last = jnp.where(start[:, None] < 0, -1, last)
    meets = jnp.arange(p.ns) * p.bs <= last[:, :, None]
    if segments is not None:
        q_low, q_high = _segment_range(segments, p.nt, p.bt)
        k_low, k_high = _segment_range(segments, p.ns, p.bs)
        meets = meets & (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    return meets


def _segment_range(segments: jax.Array, tiles: int, size: int) -> tuple[jax.Array, jax.Array]:
    """The smallest and largest segment number in each tile, padding aside: an empty range where all is padding."""
    x = _pad_axis(segments, 1, tiles * size).reshape(-1, tiles, size)
    return jnp.where(x == 0, jnp.iinfo(jnp.int32).max, x).min(axis=2), x.max(axis=2)


def spans(meets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """bool[B, n, m] -> i32[B, n] first and last met tile; (0, -1) where none is."""
    m = meets.shape[2]
    some = meets.any(axis=2)
    first = jnp.where(some, jnp.argmax(meets, axis=2), 0)
    last = jnp.where(some, m - 1 - jnp.argmax(meets[:, :, ::-1], axis=2), -1)
    return first.astype(jnp.int32), last.astype(jnp.int32)


# What follows runs inside kernel bodies: `axis` is the axis of the tile along which the index runs.


def _index(size: int, axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis)


def query_places(plan: Tiling, start: jax.Array, tile: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """i32 position (-1 in padding and empty rows) and draft slot of every query row of a tile."""
    r = _index(plan.rows, axis)
    anchor = jax.lax.div(r, plan.J * plan.G)
    slot = jax.lax.div(r - anchor * (plan.J * plan.G), plan.G)
    offset = tile * plan.bt + anchor
    real = (anchor < plan.bt) & (offset < plan.T) & (start >= 0)
    return jnp.where(real, start + offset, -1), slot


def context_mask(plan: Tiling, q_position, tile, axis: int, q_segment=None, k_segment=None) -> jax.Array:
    """bool over (query rows, slots of a context tile), or transposed; `axis` is that of the slots."""
    k_position = tile * plan.bs + _index(plan.bs, axis)
    allowed = may_attend(q_position, k_position, q_segment=q_segment, k_segment=k_segment)
    return allowed & (k_position < plan.S)


def draft_mask(plan: Tiling, q_position, q_slot, start, tile) -> jax.Array:
    """bool[rows, drafts]: a query row against the draft keys of its tile."""
    c = _index(plan.drafts, 1)
    anchor = jax.lax.div(c, plan.J)
    k_position = jnp.where(anchor < plan.bt, start + tile * plan.bt + anchor, -2)
    k_slot = c - anchor * plan.J
    return may_attend(q_position, k_position, q_slot=q_slot, k_slot=k_slot, bidirectional=plan.bidirectional)


def slots_alive(plan: Tiling, start, tile, k_segment=None) -> jax.Array:
    """bool[bs, 1]: the slots of a context tile that some query of the row may attend; the rest may hold anything."""
    slot = tile * plan.bs + _index(plan.bs, 0)
    alive = (slot < plan.S) & (slot < start + plan.T)
    return alive if k_segment is None else alive & (k_segment != 0)
