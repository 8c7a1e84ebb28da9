"""Which tokens a call of the target reads: places in a flat batch, given to rows by need and by worth.

Every decoding row gets its last committed token. Prompts get what the chunk cap leaves them, in order of arrival. The
places that are left go to drafts in order of survival, the chance that a draft and all before it are right; survival
falls along a chain, so chains stay whole and each row's number of drafts is its own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import Places
from specformer_jax.decoding.flat import Flat
from specformer_jax.decoding.state import DecodeState
from specformer_jax.nn.sharded_kernels import row_shards


class Budget(NamedTuple):
    """How many places each row gets.

    Attributes:
      reads: for committed tokens.
      drafts: for drafts.
    """

    reads: Int32[Array, " B"]
    drafts: Int32[Array, " B"]


def share(
    unread: Int32[Array, " B"], survival: Float[Array, "B J"], arrival: Int32[Array, " B"], size: int, chunk: int
) -> Budget:
    """Shares out the places of one call.

    Eight places, prompts capped at three tokens a call; rows a and c decode, b has begun its prompt, d is empty:

                unread   survival     reads  drafts
        row a        1   0.9 0.5 0.2      1       2
        row b        5   0.0 0.0 0.0      3       0
        row c        1   0.4 0.3 0.1      1       1
        row d        0   0.9 0.9 0.9      0       0

    Args:
      unread: how many committed tokens of each row are not in the cache; 0 for rows that get nothing.
      survival: the chance that a draft and all before it are right; 0 where there is none to read.
      arrival: rows with a lower number come first.
      size: static, T, the places there are; the rows that decode should not be more.
      chunk: static, the most tokens of prompts.
    """
    decoding = unread == 1
    reads = (decoding & (jnp.cumsum(decoding) <= size)).astype(jnp.int32)
    room = size - reads.sum()

    order = jnp.argsort(arrival)
    prompts = jnp.where(unread > 1, unread, 0)[order]
    taken = jnp.clip(jnp.minimum(chunk, room) - (jnp.cumsum(prompts) - prompts), 0, prompts)
    reads = reads.at[order].add(taken.astype(jnp.int32))
    room -= taken.sum()

    worth = jnp.where((reads == 1)[:, None] & decoding[:, None], jax.lax.cummin(survival, axis=1), 0)
    by_slot = worth.T.reshape(-1)  # of equal ones those of earlier slots come first
    rank = jnp.argsort(jnp.argsort(-by_slot, stable=True), stable=True)
    drafts = ((rank < room) & (by_slot > 0)).reshape(worth.T.shape).sum(axis=0, dtype=jnp.int32)
    return Budget(reads, drafts)


def survival(state: DecodeState) -> Float[Array, "B J"]:
    """The chance that each draft and all before it are right; 0 where there is none, or none that may be read.

    Confidence is calibrated slot by slot, and row by row: sigmoid(slope * logit(confidence) + offset + row offset).
    """
    chance = jax.nn.sigmoid(state.log_odds + state.row_offset[:, None])
    J = chance.shape[1]
    # The target's own token comes after the drafts: as many of them fit before the row's limit, less one.
    most = jnp.minimum(state.draft_cap, state.limit - state.known - 1)
    there = (state.drafts >= 0) & (jnp.arange(J) < most[:, None])
    return jnp.where(there, jnp.maximum(jnp.cumprod(chance, axis=1), 1e-6), 0)


def allocate(state: DecodeState, size: int, *, chunk: int = 0) -> Flat:
    """The flat batch that a call reads.

    On a mesh that splits rows over S devices each device shares out its own size / S places among its own rows.

    Args:
      state: a batch in flight.
      size: static, T, how many places there are; as many as active rows at least.
      chunk: static, the most of them that prompts take; 0 reads none.
    """
    unread = jnp.where(state.done, 0, state.known - state.read)
    of_rows = unread, survival(state), state.arrival, state.read, state.tokens, state.drafts, state.pages
    shards = row_shards(len(unread), size)
    seats = min(len(unread), size) // shards
    if shards == 1 and row_shards(seats) > 1:
        seats += 1  # one too many to divide: a mesh must not split seats from the pages of their rows
    flatten = functools.partial(_flatten, seats=seats, size=size // shards, chunk=-(-chunk // shards))
    if shards == 1:
        return flatten(*of_rows)
    flat = jax.vmap(flatten)(*(x.reshape(shards, -1, *x.shape[1:]) for x in of_rows))
    rows = len(unread) // shards

    def number(x: Array, step: int) -> Array:  # numbers that count anew on each device, over all of them
        return x + step * jnp.arange(shards, dtype=jnp.int32)[:, None]

    flat = flat._replace(
        places=dataclasses.replace(flat.places, row=number(flat.places.row, seats), shards=shards),
        seats=jnp.where(flat.seats < rows, number(flat.seats, rows), len(unread)),
        last=number(flat.last, size // shards),
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), flat)


def _flatten(unread, survival, arrival, read, tokens, drafts, pages, *, seats: int, size: int, chunk: int) -> Flat:
    budget = share(unread, survival, arrival, size, chunk)
    rows, J = survival.shape
    row_of = jnp.nonzero(budget.reads, size=seats, fill_value=rows)[0].astype(jnp.int32)

    def seated(x: Array) -> Array:
        return x.at[row_of].get(mode="fill", fill_value=0)

    reads, extra = seated(budget.reads), seated(budget.drafts)
    ends = jnp.cumsum(reads + extra)
    first = ends - reads - extra
    place = jnp.arange(size, dtype=jnp.int32)
    seat = jnp.searchsorted(ends, place, side="right", method="compare_all").astype(jnp.int32)
    taken, seat = place < ends[-1], jnp.minimum(seat, seats - 1)
    row, offset = jnp.minimum(row_of[seat], rows - 1), place - first[seat]
    position = read[row] + offset
    committed = tokens[row, jnp.minimum(position, tokens.shape[1] - 1)]
    drafted = drafts[row, jnp.clip(offset - reads[seat], 0, J - 1)] if J else committed
    return Flat(
        places=Places(
            row=seat,
            position=jnp.where(taken, position, -1),
            table=seated(pages),
            longest=size if chunk else min(size, J + 1),
        ),
        token=jnp.where(taken, jnp.where(offset < reads[seat], committed, drafted), 0),
        seats=row_of,
        last=jnp.maximum(first + reads - 1, 0),
        drafts=extra,
        asks=(reads > 0) & (reads == seated(unread)),
        reads=reads,
    )
