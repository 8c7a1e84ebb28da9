"""The forms of the kernels with operands of real sizes: ragged, grouped heads, NaN wherever nothing may be read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.sizes import Heads, Sizes
from pallas_kernels import (
    Places,
    grouped_rms_norm_downsample,
    mixed_mask_attention,
    ragged_attention,
    sample_hidden,
    sample_logits,
)
from specformer_jax.nn import cache as cache_lib

WINDOW, SLOTS = 5, 4  # tokens of a row that verifies four drafts, and the drafts of an anchor


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a kernel.

    Attributes:
      function: takes the operands and `implementation`.
      operands: what it is given.
      clean: the same with zeros in the place of NaN, for a reference.
      flops, size: the least that it has to compute and to move, in bytes.
      advance: as `programs.repeated` has it.
    """

    function: Callable[..., Any]
    operands: tuple
    clean: tuple
    flops: float
    size: float
    advance: Callable[[tuple, Any], tuple[tuple, Any]] = lambda operands, result: (operands, result)


def upcast(operands: tuple) -> tuple:
    """The same numbers in float32."""
    wide = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(wide, operands)


def attention(sizes: Sizes, dtype) -> dict[str, Case]:
    """Every form of attention that decodes."""
    found = {}
    for heads in sizes.heads:
        found[f"windows, {heads.name}"] = ragged(sizes, heads, dtype, WINDOW, sizes.rows)
        found[f"pieces of prompts, {heads.name}"] = ragged(sizes, heads, dtype, sizes.chunk, max(1, sizes.rows // 8))
    heads = sizes.heads[0]
    found["draft block and pages"] = draft_block(sizes, heads, dtype, paged=True)
    found["draft block"] = draft_block(sizes, heads, dtype, paged=False)
    found["windows, contiguous"] = contiguous(sizes, heads, dtype)
    return found


def training(sizes: Sizes, dtype) -> dict[str, Case]:
    """Packed sequences, forward and backward."""
    T, heads = sizes.packed, sizes.heads[-1]
    draw = _drawing(1, dtype)
    q, k, v = draw(2, T, heads.N, heads.H), draw(2, heads.K, T, heads.H), draw(2, heads.K, T, heads.H)
    segments = np.sort(np.random.default_rng(0).integers(1, 4, (2, T)).astype(np.int32), axis=1)
    segments[1, T - T // 8 :] = 0
    dead = jnp.asarray(segments == 0)[:, :, None, None]

    def packed(q, k, v, start, segments, *, implementation):
        return mixed_mask_attention(q, (k, v), start=start, segments=segments, implementation=implementation)

    def gradients(q, k, v, start, segments, *, implementation):
        out, back = jax.vjp(lambda q, k, v: packed(q, k, v, start, segments, implementation=implementation), q, k, v)
        return out, *back(out)

    fill = lambda value: (
        jnp.where(dead, value, q).astype(dtype),
        *(jnp.where(dead.swapaxes(1, 2), value, x).astype(dtype) for x in (k, v)),
        jnp.zeros(2, jnp.int32),
        jnp.asarray(segments),
    )
    pairs = sum(int(n) * (int(n) + 1) // 2 for row in segments for n in np.unique(row[row > 0], return_counts=True)[1])
    flops, size = 4.0 * heads.N * heads.H * pairs, q.nbytes * 2 + k.nbytes * 2
    return {
        "packed documents": Case(packed, fill(np.nan), fill(0.0), flops, size),
        "packed documents, backward": Case(gradients, fill(np.nan), fill(0.0), 3.5 * flops, 2.5 * size),
    }


def sampling(sizes: Sizes, dtype) -> dict[str, Case]:
    """The LM head with its noise, over all of the vocabulary and over a part of it, and sampling from logits."""
    R, V, D = sizes.sampled, sizes.vocabulary, sizes.width
    draw, random = _drawing(2, dtype), np.random.default_rng(0)
    rows = (
        jnp.arange(R, dtype=jnp.uint32),
        jnp.asarray(random.integers(0, 4000, R), jnp.int32),
        jnp.where(jnp.arange(R) % 2 == 0, 0.0, 0.8).astype(jnp.float32),
    )
    hidden, lm_head = draw(R, D), draw(V, D) * jnp.asarray(D**-0.5 * 3, dtype)
    logits, threshold = draw(R, V) * jnp.asarray(3, dtype), jnp.full(R, 1.0, jnp.float32)
    few = jnp.asarray(random.choice(V, sizes.pruned, replace=False).astype(np.int32))

    def whole(hidden, lm_head, seed, position, temperature, *, implementation):
        keywords = dict(confidence=True, implementation=implementation)
        return sample_hidden(hidden, lm_head, seed=seed, position=position, temperature=temperature, **keywords)

    def part(hidden, lm_head, ids, seed, position, temperature, *, implementation):
        keywords = dict(token_ids=ids, confidence=True, implementation=implementation)
        return sample_hidden(hidden, lm_head, seed=seed, position=position, temperature=temperature, **keywords)

    def of_logits(logits, threshold, seed, position, temperature, *, implementation):
        keywords = dict(threshold=threshold, confidence=True, implementation=implementation)
        return sample_logits(logits, seed=seed, position=position, temperature=temperature, **keywords)

    def case(function, *operands, flops=0.0):
        return Case(function, (*operands, *rows), (*operands, *rows), flops, sum(x.nbytes for x in operands))

    return {
        "LM head": case(whole, hidden, lm_head, flops=2.0 * R * V * D),
        "pruned LM head": case(part, hidden, lm_head[few], few, flops=2.0 * R * sizes.pruned * D),
        "logits": case(of_logits, logits, threshold),
    }


def norm(sizes: Sizes, dtype) -> dict[str, Case]:
    """The head's downsampler over four hooks."""
    R, D = sizes.sampled, sizes.width
    draw = _drawing(3, dtype)
    operands = (draw(R, 4, D), draw(4, D).astype(jnp.float32), draw(4, D, D) * jnp.asarray(D**-0.5, dtype))
    downsample = functools.partial(grouped_rms_norm_downsample, epsilon=1e-6)
    return {"downsampler": Case(downsample, operands, operands, 8.0 * R * D * D, sum(x.nbytes for x in operands))}


FORMS = {"attention": attention, "attention for training": training, "sampling": sampling, "norm": norm}


def ragged(sizes: Sizes, heads: Heads, dtype, tokens: int, rows: int) -> Case:
    """A flat batch over pages: rows of so many tokens, most of them full, two tokens nobody's."""
    p = sizes.page or cache_lib.page_size()
    tables = -(-sizes.positions // p)
    P, C, T = rows * tables + 1, tables * p, rows * tokens
    start = starts(rows, C, tokens)
    draw = _drawing(0, dtype)
    pages = tuple(draw(P, heads.K, p, heads.H) for _ in range(2))
    q, k, v = draw(T + 2, heads.N, heads.H), draw(T + 2, heads.K, heads.H), draw(T + 2, heads.K, heads.H)
    table = np.random.default_rng(0).permutation(P - 1).reshape(rows, tables).astype(np.int32)
    places = Places(
        row=jnp.asarray(np.r_[np.repeat(np.arange(rows), tokens), 0, 0], jnp.int32),
        position=jnp.asarray(np.r_[(start[:, None] + np.arange(tokens)).reshape(-1), -1, -1], jnp.int32),
        table=jnp.asarray(table),
        longest=tokens,
    )

    def fill(value):
        mine = [x.at[T:].set(value) for x in (q, k, v)]
        return (*mine, tuple(x.at[P - 1].set(value) for x in pages), places)

    read = float(np.minimum(start + tokens, C).sum())
    seen = float((start[:, None] + np.arange(tokens) + 1).sum())
    return Case(
        ragged_attention,
        fill(np.nan),
        fill(0.0),
        flops=4.0 * heads.N * heads.H * seen,
        size=2 * read * heads.K * heads.H * dtype.itemsize + 2 * q.nbytes + 2 * k.nbytes,
        advance=lambda operands, result: ((*operands[:3], result[1], operands[4]), result[0]),
    )


def starts(rows: int, C: int, tokens: int) -> np.ndarray:
    """Where rows stand: a few at the edges of pages and at the beginning, the rest as far as they can."""
    edges = [0, 1, 15, 16, 17, C // 2]
    found = np.full(rows, C - tokens, np.int32)
    found[: min(len(edges), rows // 4)] = edges[: rows // 4]
    return np.minimum(found, C - tokens)


def draft_block(sizes: Sizes, heads: Heads, dtype, *, paged: bool) -> Case:
    """The drafts of one anchor a row, with the row's pages in the same softmax or without them; row 0 is empty."""
    rows, (_, N, K, H) = sizes.rows, heads
    draw = _drawing(4, dtype)
    q, draft = draw(rows, 1, SLOTS, N, H), (draw(rows, 1, SLOTS, K, H), draw(rows, 1, SLOTS, K, H))
    pages, table, C = (), None, 0
    if paged:
        p = sizes.page or cache_lib.page_size()
        tables = -(-sizes.positions // p)
        C, table = tables * p, jnp.arange(rows * tables, dtype=jnp.int32).reshape(rows, tables)
        pages = tuple(draw(rows * tables, K, p, H) for _ in range(2))
    start = starts(rows, max(C, 64), 1)
    start[0] = -1
    dead_row, end = jnp.asarray(start < 0), jnp.asarray(np.where(start < 0, 0, start + 1))

    def fill(value):
        clear = lambda x: jnp.where(dead_row.reshape(-1, *[1] * (x.ndim - 1)), value, x).astype(dtype)
        held = tuple(_past(x, end, rows, value) for x in pages)
        return (clear(q), held, tuple(map(clear, draft)), jnp.asarray(start), *(() if table is None else (table,)))

    def function(q, pages, draft, start, table=None, *, implementation):
        return mixed_mask_attention(q, pages or None, draft, start=start, table=table, implementation=implementation)

    read = float(np.where(start < 0, 0, start + 1).sum()) if paged else 0.0
    flops = 4.0 * N * H * SLOTS * (read + SLOTS * rows)
    size = 2 * read * K * H * dtype.itemsize + 2 * q.nbytes + 2 * draft[0].nbytes
    return Case(function, fill(np.nan), fill(0.0), flops, size)


def _past(pages: jax.Array, end: jax.Array, rows: int, value: float) -> jax.Array:
    """Pages of rows one after the other, with a value in the positions from each row's end on."""
    P, _, p, _ = pages.shape
    position = jnp.arange(P * p).reshape(rows, -1)
    dead = position - position[:, :1] >= end[:, None]
    return jnp.where(dead.reshape(P, 1, p, 1), value, pages).astype(pages.dtype)


def contiguous(sizes: Sizes, heads: Heads, dtype) -> Case:
    """Windows of rows whose positions lie side by side; row 0 is empty."""
    rows, C, (_, N, K, H) = sizes.rows, sizes.positions, heads
    draw = _drawing(5, dtype)
    q, k, v = draw(rows, WINDOW, N, H), draw(rows, K, C, H), draw(rows, K, C, H)
    start = starts(rows, C, WINDOW)
    start[0] = -1
    end = np.where(start < 0, 0, start + WINDOW)
    dead = jnp.asarray(np.arange(C) >= end[:, None])[:, None, :, None]

    def fill(value):
        return q.at[0].set(value), *(jnp.where(dead, value, x).astype(dtype) for x in (k, v)), jnp.asarray(start)

    def function(q, k, v, start, *, implementation):
        return mixed_mask_attention(q, (k, v), start=start, implementation=implementation)

    read = float(end.sum())
    size = 2 * read * K * H * dtype.itemsize + 2 * q.nbytes
    return Case(function, fill(np.nan), fill(0.0), 4.0 * N * H * WINDOW * read, size)


def _drawing(seed: int, dtype) -> Callable[..., jax.Array]:
    """Draws normal numbers on the device, others with each call."""
    number = iter(range(1000))
    make = jax.jit(lambda key, shape: jax.random.normal(key, shape, dtype), static_argnums=1)
    return lambda *shape: make(jax.random.fold_in(jax.random.key(seed), next(number)), shape)
