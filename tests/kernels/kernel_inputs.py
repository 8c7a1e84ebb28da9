"""Inputs for the kernel tests: random operands with NaN wherever nothing may be read."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


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
