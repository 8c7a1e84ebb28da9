"""Attention of a flat batch over a paged cache: writes what the tokens bring, then attends tile by tile."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.attention import cpu
from pallas_kernels.attention.api import mixed_mask_attention, why_no_kernel, why_no_mosaic_gpu
from pallas_kernels.attention.places import Pages, Places
from pallas_kernels.dispatch import Implementation

TILE = 32


def ragged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    pages: Pages,
    places: Places,
    *,
    tile: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "T N H"], Pages]:
    """Writes the tokens' keys and values into the pages and attends causally, each token to its row up to itself.

    softmax(q k^T / sqrt(H)) v, scores and sums in float32. The tokens of a row are cut into tiles, which are the rows
    of `mixed_mask_attention`. A flat batch of eleven tokens, of which two are nobody's, in tiles of three: row 0 reads
    a chunk of its prompt, row 2 verifies three drafts, row 1 begins.

        token     0  1  2  3  4  5  6  7  8  9 10
        row       0  0  0  0  0  .  2  2  2  2  1
        position  4  5  6  7  8  . 12 13 14 15  0
        tile      0  0  0  1  1  .  2  2  2  3  4

    Args:
      q, k, v: the queries, keys and values of the tokens, keys and values in the dtype of the pages or cast to it.
      pages: the cache, keys and values. Where they have never been written they must be finite: what a tile's last
        queries would read past the last token has weight 0.
      places: where the tokens stand. A row's table may name any page where the row has no positions yet.
      tile: static; how many tokens of a row are taken together. None takes all of a row's where they are few
        (`places.longest`), and up to `TILE` of them.
      implementation: None, "pallas", "mosaic_gpu", "xla" or "native"; see `dispatch`.

    Returns:
      What each token attends to, in the dtype of q, and the pages. A token that is nobody's writes nothing and its
      output is zero. A token past the last page of its table writes nothing. NaN is written as 0: a masked position has
      weight 0, and 0 * NaN would reach the row's next request.

    Raises:
      ValueError: shapes that do not fit together.
      NotImplementedError: a body was named where it cannot run, or a gradient was asked for; it says why.
    """
    tile = min(len(q), places.longest or TILE, TILE) if tile is None else tile
    _check(q, k, v, pages, places, tile)
    p = pages[0].shape[2]
    choice = dispatch.why(
        implementation,
        unsupported=why_no_kernel((q, pages), p),
        no_native=cpu.no_native_body(q, k, v, pages),
        no_mosaic_gpu=why_no_mosaic_gpu(q, pages, p),
    )
    if choice.implementation == "native":
        return cpu.ragged(q, k, v, pages, places)
    pages = _write(pages, k, v, places)
    cut = cut_into_tiles(places, tile)
    # Tokens past a tile's own are another tile's or nobody's: what they get here is not looked at.
    members = jnp.minimum(cut.first[:, None] + jnp.arange(tile), len(q) - 1)
    start = jnp.where(cut.first < len(q), places.position[members[:, 0]], -1)
    table = places.table.at[places.row[members[:, 0]]].get(mode="clip")
    out = mixed_mask_attention(q[members], pages, start=start, table=table, implementation=choice.implementation)
    out = out[cut.tile, jnp.arange(len(q)) - cut.first[cut.tile]]
    return jnp.where((places.position >= 0)[:, None, None], out, 0), pages


class Cut(NamedTuple):
    """How a flat batch is cut into tiles.

    Attributes:
      first: the first token of each tile; T where there is no such tile.
      tile: the tile of each token; of one that is nobody's, any.
    """

    first: Int32[Array, " tiles"]
    tile: Int32[Array, " T"]


def cut_into_tiles(places: Places, tile: int) -> Cut:
    """Cuts the tokens of every row, which lie side by side, into tiles of at most `tile` tokens."""
    T, B = places.row.shape[0], places.table.shape[0]
    token, mine = jnp.arange(T, dtype=jnp.int32), places.position >= 0
    continued = mine[1:] & mine[:-1] & (places.row[1:] == places.row[:-1])
    begins = mine & ~jnp.pad(continued, (1, 0))
    of_row = token - jax.lax.cummax(jnp.where(begins, token, 0))  # a token's number among those of its row
    leads = mine & (of_row % tile == 0)
    tiles = min(T, B + T // tile)  # a row's last tile may be any size, the others are full
    if places.longest is not None:
        tiles = min(tiles, B * -(-places.longest // tile))
    (first,) = jnp.nonzero(leads, size=tiles, fill_value=T)
    return Cut(first.astype(jnp.int32), jnp.maximum(jnp.cumsum(leads, dtype=jnp.int32) - 1, 0))


def _write(pages: Pages, k: Float[Array, "T K H"], v: Float[Array, "T K H"], places: Places) -> Pages:
    """The pages with the tokens' keys and values at their positions."""
    P, K, p, _ = pages[0].shape
    row, position, table = places.row, places.position, places.table
    T, tables = position.shape[0], table.shape[1]
    page = table.at[row, position // p].get(mode="clip")
    writes = (position >= 0) & (position < tables * p)
    page = jnp.where(writes, page, P + jnp.arange(T))  # no page, and no two tokens in the same place
    # Three indices and no slice: XLA's CPU backend turns a lone index into an update that copies the pages.
    at = (page[:, None], jnp.arange(K), (position % p)[:, None])

    def put(old: Array, new: Array) -> Array:
        return old.at[at].set(jnp.nan_to_num(new.astype(old.dtype)), mode="drop", unique_indices=True)

    return put(pages[0], k), put(pages[1], v)


def _check(q, k, v, pages, places, tile: int) -> None:
    """Raises ValueError with the rule that the shapes break."""
    if q.ndim != 3:
        raise ValueError(f"q must be [T, N, H], got {q.shape}")
    T, N, H = q.shape
    if k.shape != v.shape or k.ndim != 3 or k.shape[0] != T or k.shape[2] != H:
        raise ValueError(f"k and v must be [T={T}, K, H={H}], got {k.shape} and {v.shape}")
    K = k.shape[1]
    if N % K:
        raise ValueError(f"{N} query heads cannot be grouped over {K} key/value heads")
    keys, values = (x.shape for x in pages)
    if keys != values or len(keys) != 4 or keys[1] != K or keys[3] != H:
        raise ValueError(f"pages must be two [P, K={K}, p, H={H}], got {keys} and {values}")
    if places.row.shape != (T,) or places.position.shape != (T,):
        got = f"{places.row.shape} and {places.position.shape}"
        raise ValueError(f"row and position must be [T] = [{T}], got {got}")
    if places.table.ndim != 2:
        raise ValueError(f"table must be [B, tables], got {places.table.shape}")
    if tile < 1:
        raise ValueError(f"a tile must hold at least one token, got {tile}")
