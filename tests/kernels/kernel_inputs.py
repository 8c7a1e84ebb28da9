"""Inputs for the kernel tests: random operands with NaN wherever nothing may be read."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pallas_kernels import Places

# Sizes of an attention that a property test draws; `group` query heads share one of K.
ATTENTION_SIZES = dict(
    seed=st.integers(0, 2**31),
    T=st.integers(1, 9),
    J=st.none() | st.integers(1, 8),
    group=st.sampled_from([1, 3, 4, 8]),
    K=st.integers(1, 2),
)


def drawn(examples: int):
    """How a property test of kernels draws: so many examples, the same ones every time."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )


class Case(NamedTuple):
    """Operands of one attention call; `clean` has zeros where `dirty` has NaN."""

    clean: tuple
    dirty: tuple
    keywords: dict


def attention_case(
    seed, *, B=3, T=4, C=24, N=6, K=2, H=16, J=None, context=True, start=None, packed=False, dtype=jnp.float32
) -> Case:
    """q, context and draft for `mixed_mask_attention`; full sequences (start 0, T == C) when `packed`."""
    rng = np.random.default_rng(seed)
    C = T if packed else C
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q = normal(B, T, N, H) if J is None else normal(B, T, J, N, H)
    kv = (normal(B, K, C, H), normal(B, K, C, H)) if context else None
    draft = None if J is None else (normal(B, T, J, K, H), normal(B, T, J, K, H))
    segments = None
    if packed:
        start = np.zeros(B, np.int32)
        segments = np.sort(rng.integers(1, 4, (B, T)).astype(np.int32), axis=1)
        for b in range(B):
            segments[b, T - rng.integers(0, T // 2 + 1) :] = 0
        segments[-1] = 0 if B > 1 else segments[-1]
    elif start is None:
        start = rng.integers(-1, C - T + 1, B).astype(np.int32)
    start = np.asarray(start, np.int32)

    dead_anchor = (start[:, None] < 0) | np.zeros((B, T), bool)
    dead_position = np.arange(C) >= np.where(start < 0, 0, start + T)[:, None]
    if packed:
        dead_anchor, dead_position = segments == 0, segments == 0

    def fill(value):
        out = [q.copy(), None, None]
        out[0][dead_anchor] = value
        if context:
            out[1] = tuple(x.copy() for x in kv)
            for x in out[1]:
                x.transpose(0, 2, 1, 3)[dead_position] = value
        if J is not None:
            out[2] = tuple(x.copy() for x in draft)
            for x in out[2]:
                x[dead_anchor] = value
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), tuple(out))

    keywords = dict(start=jnp.asarray(start))
    if packed:
        keywords["segments"] = jnp.asarray(segments)
    return Case(fill(0.0), fill(np.nan), keywords)


def dense_attention(q, context, draft, *, start, segments=None, bidirectional=True):
    """Attention one query at a time in float64 numpy: shares nothing with the package but the rule in words."""
    q, block = np.asarray(q, np.float64), q.ndim == 5
    q = q if block else q[:, :, None]
    context, draft = jax.tree.map(lambda x: np.asarray(x, np.float64), (context, draft))
    start, segments = np.asarray(start), None if segments is None else np.asarray(segments)
    B, T, J, N, H = q.shape
    K = context[0].shape[1] if context is not None else draft[0].shape[3]
    out = np.zeros(q.shape)
    for b, t, j, n in np.ndindex(B, T, J, N):
        if start[b] < 0 or (segments is not None and segments[b, t] == 0):
            continue
        keys, values, k = [], [], n // (N // K)
        if context is not None:
            for c in range(min(context[0].shape[2], start[b] + t + 1)):
                if segments is None or segments[b, c] == segments[b, t]:
                    keys.append(context[0][b, k, c])
                    values.append(context[1][b, k, c])
        if draft is not None:
            for i in range(J if bidirectional else j + 1):
                keys.append(draft[0][b, t, i, k])
                values.append(draft[1][b, t, i, k])
        scores = np.array(keys) @ q[b, t, j, n] * H**-0.5
        weights = np.exp(scores - scores.max())
        out[b, t, j, n] = weights @ np.array(values) / weights.sum()
    return out if block else out[:, :, 0]


def in_pages(seed, context, end, p, *, copies=()):
    """The positions of each row in shuffled pages of p, and the table that finds them.

    Pages that no row uses are NaN, and any page stands in a table where a row has no positions.

    Args:
      seed: of the shuffle.
      context: keys and values, [B, K, C, H]; p divides C.
      end: one past the last position of each row.
      p: positions of a page.
      copies: ((row, page of the row), ...) whose positions are those of row 0: they share its page.
    """
    rng = np.random.default_rng(seed)
    dtype, (B, K, C, H) = context[0].dtype, context[0].shape
    context, end = [np.asarray(x, np.float32) for x in context], np.asarray(end)
    P = B * C // p + 2
    free = list(rng.permutation(P))
    pages = [np.full((P, K, p, H), np.nan, np.float32) for _ in context]
    table = rng.integers(0, P, (B, C // p)).astype(np.int32)
    for b, i in np.ndindex(*table.shape):
        if (b, i) in copies:
            table[b, i] = table[0, i]
        elif i * p < end[b]:
            table[b, i] = free.pop()
            for paged, x in zip(pages, context, strict=True):
                paged[table[b, i]] = x[b, :, i * p : (i + 1) * p]
    return tuple(jnp.asarray(x, dtype) for x in pages), jnp.asarray(table)


class Flat(NamedTuple):
    """Operands of `ragged_attention`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    pages: tuple
    places: Places


def flat_case(seed, rows, *, p=16, tables=3, N=6, K=2, H=16, nobody=3, dtype=jnp.float32) -> Flat:
    """A flat batch: each of `rows` is (start, tokens), in shuffled order, with tokens that are nobody's between them.

    Cached positions are random, those to come as large as a position of another request may be; pages in no table and
    all that nobody's tokens hold are NaN.
    """
    rng = np.random.default_rng(seed)
    B, C = len(rows), tables * p
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    context = [normal(B, K, C, H) for _ in range(2)]
    for x in context:
        for b, (start, _) in enumerate(rows):
            x[b, :, max(start, 0) :] = 1e4
    pages, table = in_pages(seed, tuple(jnp.asarray(x) for x in context), [C] * B, p)
    order = rng.permutation([*range(B), *[-1] * nobody])
    row = np.concatenate([[b] * (rows[b][1] if b >= 0 else 1) for b in order]).astype(np.int32)
    position = np.concatenate([rows[b][0] + np.arange(rows[b][1]) if b >= 0 else [-1] for b in order]).astype(np.int32)
    T = len(row)
    q, k, v = normal(T, N, H), normal(T, K, H), normal(T, K, H)
    for x in (q, k, v):
        x[position < 0] = np.nan
    row[position < 0] = rng.integers(-5, 99, (position < 0).sum())
    q, k, v, pages = jax.tree.map(lambda x: jnp.asarray(x, dtype), (q, k, v, pages))
    return Flat(q, k, v, pages, Places(jnp.asarray(row), jnp.asarray(position), table))


def dense_ragged(q, k, v, pages, places, window=None):
    """`ragged_attention` token by token in float64 numpy: writes all, then attends.

    With a window, over `places.windowed`: from the page on that has the window of the row's first token.
    """
    dtype = pages[0].dtype
    q = np.asarray(q, np.float64)
    k, v = (np.asarray(x.astype(dtype), np.float64) for x in (k, v))
    pages = [np.array(x, np.float64) for x in pages]
    row, position, table = (np.asarray(x) for x in (places.row, places.position, places.table))
    p, C = pages[0].shape[2], pages[0].shape[2] * table.shape[1]
    group, out = q.shape[1] // k.shape[1], np.zeros(q.shape)
    window = None if window is None or window >= C else window
    mine = [t for t in range(len(q)) if position[t] >= 0]
    for t in mine:
        if position[t] < C:
            for paged, x in zip(pages, (k, v), strict=True):
                paged[table[row[t], position[t] // p], :, position[t] % p] = np.where(np.isnan(x[t]), 0, x[t])
    for t in mine:
        if window is not None and position[t] >= C:
            continue
        first = min(position[other] for other in mine if row[other] == row[t])
        begin = 0 if window is None else max(first - window + 1, 0) // p * p
        c = np.arange(begin, min(position[t] + 1, C))
        keys, values = (x[table[row[t]][c // p], :, c % p] for x in pages)  # [c, K, H]
        for n in range(q.shape[1]):
            scores = keys[:, n // group] @ q[t, n] * q.shape[2] ** -0.5
            weights = np.exp(scores - scores.max())
            out[t, n] = weights @ values[:, n // group] / weights.sum()
    return out, pages
