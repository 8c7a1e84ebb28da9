"""The kernels as the model calls them: one device's share each, inside `shard_map` where a mesh is set.

A Pallas call cannot be split by XLA's partitioner, so on a mesh each kernel runs on what its device holds: rows over
the axes `data` and `fsdp`, key/value heads, vocabulary and downsampled columns over `model`. Set the mesh around the
jitted call (`with jax.set_mesh(mesh): ...`); without one, or on one device, the kernels are called as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels import Places, Sample
from specformer_jax.nn.cache import LayerKV
from specformer_jax.nn.mesh import MODEL, ROWS

Array = jax.Array


def mixed_mask_attention(
    q: Array, kv: LayerKV | None, draft=None, *, start, table=None, segments=None, bidirectional=True
) -> Array:
    """`pallas_kernels.mixed_mask_attention`, rows (with their pages) and key/value heads split over the mesh."""

    def share(q, kv, draft, start, table, segments):
        return pallas_kernels.mixed_mask_attention(
            q,
            None if kv is None else tuple(kv),
            draft,
            start=start,
            table=None if table is None else table % len(kv.k),  # by the numbers of a device's own pages
            segments=segments,
            bidirectional=bidirectional,
        )

    mesh = _mesh()
    if mesh is None:
        return share(q, kv, draft, start, table, segments)
    rows = _rows(mesh, q.shape[0])
    queries = P(rows, *[None] * (q.ndim - 3), MODEL, None)
    keys = None if kv is None else P(rows, MODEL, None, None)
    slots = None if draft is None else P(rows, None, None, MODEL, None)
    of_rows = [None if x is None else P(rows, None) for x in (table, segments)]
    specs = (queries, keys, slots, P(rows), *of_rows)
    split = jax.shard_map(share, in_specs=specs, out_specs=queries, check_vma=False)
    return split(q, kv, draft, start, table, segments)


def ragged_attention(q: Array, k: Array, v: Array, kv: LayerKV, places: Places | None) -> tuple[Array, LayerKV]:
    """`pallas_kernels.ragged_attention`, key/value heads split over the mesh, and tokens, rows and pages alike.

    Each of `places.shards` devices has an equal part of the rows, of the pages and of the flat batch, in which are only
    its own rows' tokens. Rows and pages are numbered over all devices.
    """

    assert places is not None

    def share(q, k, v, kv, places):
        own = dataclasses.replace(places, row=places.row % len(places.table), table=places.table % len(kv.k))
        heads, pages = pallas_kernels.ragged_attention(q, k, v, tuple(kv), own)
        return heads, LayerKV(*pages)

    mesh = _mesh()
    if mesh is None:
        return share(q, k, v, kv, places)
    rows = None if places.shards == 1 else ROWS
    tokens, pages = P(rows, MODEL, None), P(rows, MODEL, None, None)
    specs = (tokens, tokens, tokens, pages, P(rows))
    return jax.shard_map(share, in_specs=specs, out_specs=(tokens, pages), check_vma=False)(q, k, v, kv, places)


def sample_logits(logits, *, seed, position, temperature, threshold=None, confidence=False) -> Sample:
    """`pallas_kernels.sample_logits`, rows and vocabulary split over the mesh."""
    mesh = _mesh()
    columns = None if mesh is None else _columns(mesh, logits.shape[1])

    def share(logits, by_row):
        return pallas_kernels.sample_logits(logits, **by_row, confidence=confidence, axis_name=columns)

    by_row = dict(seed=seed, position=position, temperature=temperature, threshold=threshold)
    if mesh is None:
        return share(logits, by_row)
    rows = _rows(mesh, len(logits))
    specs = (P(rows, columns), P(rows))
    return jax.shard_map(share, in_specs=specs, out_specs=P(rows), check_vma=False)(logits, by_row)


def sample_hidden(hidden, lm_head, *, seed, position, temperature, token_ids=None, confidence=False) -> Sample:
    """`pallas_kernels.sample_hidden`, rows and vocabulary split over the mesh."""
    mesh = _mesh()
    columns = None if mesh is None else _columns(mesh, len(lm_head))

    def share(hidden, lm_head, by_row, token_ids):
        keywords = dict(by_row, token_ids=token_ids, confidence=confidence, axis_name=columns)
        return pallas_kernels.sample_hidden(hidden, lm_head, **keywords)

    by_row = dict(seed=seed, position=position, temperature=temperature)
    if mesh is None:
        return share(hidden, lm_head, by_row, token_ids)
    rows = _rows(mesh, len(hidden))
    specs = (P(rows, None), P(columns, None), P(rows), P(columns))
    split = jax.shard_map(share, in_specs=specs, out_specs=P(rows), check_vma=False)
    return split(hidden, lm_head, by_row, token_ids)


def grouped_rms_norm_downsample(hooks, scale, kernel, *, epsilon) -> Array:
    """`pallas_kernels.grouped_rms_norm_downsample`, rows and output columns split over the mesh."""
    call = functools.partial(pallas_kernels.grouped_rms_norm_downsample, epsilon=epsilon)
    mesh = _mesh()
    if mesh is None:
        return call(hooks, scale, kernel)
    rows, columns = _rows(mesh, hooks.shape[0]), _columns(mesh, kernel.shape[-1])
    lead = [None] * (hooks.ndim - 3)
    specs = (P(rows, *lead, None, None), P(), P(None, None, columns))
    return jax.shard_map(call, in_specs=specs, out_specs=P(rows, *lead, columns), check_vma=False)(hooks, scale, kernel)


def place_pages(cache):
    """The layout of a cache on a mesh: pages over the rows' axes, their key/value heads over `model`.

    A program whose inputs and outputs keep it takes what another gave without compiling again.
    """
    mesh = _mesh()
    if mesh is None:
        return cache
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, P(_rows(mesh, x.shape[0]), _columns(mesh, x.shape[1]))), cache
    )


def row_shards(*counts: int) -> int:
    """Over how many devices a batch is split, whose rows, tokens and pages are so many; 1 if one does not divide."""
    mesh = _mesh()
    return 1 if mesh is None or _rows(mesh, math.gcd(*counts)) is None else math.prod(mesh.shape[a] for a in ROWS)


def whole_columns(x: Array) -> Array:
    """x f[R, ...] with rows split over the mesh and the rest whole on every device, gathered here if it was not.

    For what many products read: left to itself, XLA may gather it before each of them.
    """
    mesh = _mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, P(_rows(mesh, len(x))))


def _mesh():
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def _rows(mesh, count: int):
    """The axes that rows are split over; a batch that does not divide is kept whole."""
    return None if count % math.prod(mesh.shape[axis] for axis in ROWS) else ROWS


def _columns(mesh, count: int):
    """The axis that columns are split over; what does not divide is kept whole."""
    return None if mesh.shape[MODEL] == 1 or count % mesh.shape[MODEL] else MODEL
