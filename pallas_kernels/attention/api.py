"""Mixed-mask attention: a ragged causal context and a bidirectional draft block in one softmax."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, tuning
from pallas_kernels.attention import long_cache, tiles
from pallas_kernels.dispatch import Choice, Implementation
from pallas_kernels.masks import may_attend
from pallas_kernels.product.api import exact

KeyValue = tuple[jax.Array, jax.Array]


def mixed_mask_attention(
    q: jax.Array,
    context: KeyValue | None,
    draft: KeyValue | None = None,
    *,
    start: jax.Array,
    segments: jax.Array | None = None,
    bidirectional: bool = True,
    transposed_keys: bool = False,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """softmax(scale * q k^T) v under `may_attend`, scores and sums in float32.

    Three forms:
      decode: q is a window of T = W tokens, `context` the KV cache with the window's own keys and values already
        written at slots start .. start + W - 1. Also prefill, with a large T.
      full sequence: start = 0, T == S, packed documents by `segments`; differentiable.
      draft block: J drafts for each anchor t (SpecFormer's DBA); with `context`, in the same softmax, also everything
        the anchor may attend. Differentiable.

    Args:
      q: [B, T, N, H], or [B, T, J, N, H] with a draft block.
      context: None or (k, v), each [B, K, S, H]: head-major. N is a multiple of K.
      draft: None or (k, v), each [B, T, J, K, H].
      start: i32[B], absolute position of each row's first anchor; anchor t sits at start + t and attends context slots
        s <= start + t. A negative start marks an empty row: its output is zero.
      segments: None or i32[B, S] with S == T and start == 0; 0 is padding, its output is zero.
      bidirectional: False makes the draft block causal over J (the paper's ablation, Table 4).
      transposed_keys: the context's k is [B, K, H, S], without segments: what a CPU reads fastest. Not in the kernels.
      scale: of the scores, H ** -0.5 by default.
      implementation: None, "pallas" or "xla"; see `dispatch`.

    Returns:
      Of the shape and dtype of q. What no query may attend (slots past the end, padding, empty rows) never reaches the
      output; in the kernels not even a NaN (in the reference, cache slots past the end must be finite).

    Raises:
      ValueError: shapes that do not fit together.
      NotImplementedError: "pallas" was named where the kernels cannot run; it says why.
    """
    _check(q, context, draft, start, segments, transposed_keys)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtypes = {x.dtype.name for x in jax.tree.leaves((q, context, draft))}
    unsupported = f"queries, keys and values have different dtypes: {sorted(dtypes)}" if len(dtypes) > 1 else None
    if transposed_keys:
        unsupported = "the keys are transposed"
    choice = dispatch.why(implementation, unsupported=unsupported, no_native=dispatch.NO_NATIVE_BODY)
    static = dict(bidirectional=bidirectional, scale=scale)
    if choice.implementation == "xla":
        if transposed_keys and draft is None and context[1].shape[2] > long_cache.LONG:
            return long_cache.attend(q, *context, start=start, scale=scale)
        static["transposed_keys"] = transposed_keys
        return reference(q, context, draft, start=start, segments=segments, **static)
    return _kernel(choice, q, context, draft, start=start, segments=segments, **static)


def reference(
    q: jax.Array,
    context: KeyValue | None,
    draft: KeyValue | None = None,
    *,
    start: jax.Array,
    segments: jax.Array | None = None,
    bidirectional: bool = True,
    transposed_keys: bool = False,
    scale: float,
) -> jax.Array:
    """The specification in jnp, and what a CPU runs; arguments as `mixed_mask_attention`.

    Without segments it expects dead context slots to be finite: a pass over the whole cache to clear them would double
    its cost. The kernels clear them tile by tile and do not.
    """
    in_block = draft is not None
    if not in_block:
        q = q[:, :, None]  # a plain query is a block of one slot
    B, T, J, N, H = q.shape
    K = (draft or context)[0].shape[-2 if in_block else 1]
    G = N // K
    position = start[:, None] + jnp.arange(T)  # [B, T]
    position = jnp.where(start[:, None] < 0, -1, position)
    alive = position >= 0 if segments is None else (position >= 0) & (segments != 0)
    # [B, T, J, K, G, H] -> [B, K, T, J, G, H]: a key/value head meets its whole query group in one product.
    q = q.reshape(B, T, J, K, G, H).transpose(0, 3, 1, 2, 4, 5)
    q = jnp.where(alive[:, None, :, None, None, None], q, 0)
    scores, values = [], []

    if context is not None:
        k, v = context
        S = v.shape[2]
        slot = jnp.arange(S)
        if segments is None:
            allowed = may_attend(position[:, :, None], slot)  # [B, T, S]
        else:
            k, v = (jnp.where(alive[:, None, :, None], x, 0) for x in context)
            allowed = may_attend(
                position[:, :, None], slot, q_segment=segments[:, :, None], k_segment=segments[:, None, :]
            )
        # r = (T J G); the cache may be wider than q (float32 on CPU) and decides the product's dtype.
        rows = q.reshape(B, K, T * J * G, H).astype(k.dtype)
        product = "bkrh,bkhs->bkrs" if transposed_keys else "bkrh,bksh->bkrs"
        s = jnp.einsum(product, rows, k, precision=exact(k.dtype), preferred_element_type=jnp.float32)
        s = s.reshape(B, K, T, J, G, S) * scale
        scores.append(jnp.where(allowed[:, None, :, None, None, :], s, -jnp.inf))
        values.append(v)

    if draft is not None:
        k, v = (jnp.where(alive[:, :, None, None, None], x, 0) for x in draft)
        j = jnp.arange(J)
        allowed = may_attend(
            position[:, :, None, None],
            position[:, :, None, None],
            q_slot=j[:, None],
            k_slot=j[None, :],
            bidirectional=bidirectional,
        )  # [B, T, J, J] or [B, T, 1, 1]
        allowed = allowed & alive[:, :, None, None]
        s = jnp.einsum("bktjgh,btikh->bktjgi", q, k, precision=exact(k.dtype), preferred_element_type=jnp.float32)
        s = s * scale
        scores.append(jnp.where(allowed[:, None, :, :, None, :], s, -jnp.inf))
        values.append(v)

    top = jnp.max(jnp.stack([s.max(-1) for s in scores]), axis=0)[..., None]
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))  # rows that attend nothing
    weights = [jnp.exp(s - top) for s in scores]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    out = 0.0
    if context is not None:
        w = weights.pop(0).astype(context[1].dtype).reshape(B, K, T * J * G, -1)
        out = jnp.einsum(
            "bkrs,bksh->bkrh", w, values.pop(0), precision=exact(w.dtype), preferred_element_type=jnp.float32
        )
        out = out.reshape(B, K, T, J, G, H)
    if draft is not None:
        w = weights.pop(0).astype(values[0].dtype)
        out = out + jnp.einsum(
            "bktjgi,btikh->bktjgh", w, values.pop(0), precision=exact(w.dtype), preferred_element_type=jnp.float32
        )
    out = (out / jnp.where(total == 0.0, 1.0, total)).astype(q.dtype)
    out = out.transpose(0, 2, 3, 1, 4, 5).reshape(B, T, J, N, H)
    return out if in_block else out[:, :, 0]


def _kernel(choice: Choice, q, context, draft, *, start, segments, bidirectional, scale) -> jax.Array:
    """Folds the operands for the kernel bodies, and what they return back."""
    in_block = draft is not None
    if not in_block:
        q = q[:, :, None]
    shape = q.shape
    alive = jnp.broadcast_to(start[:, None] >= 0, shape[:2])
    if segments is not None:
        alive = alive & (segments != 0)
    alive = alive[:, :, None, None, None]
    # Dead anchors may hold NaN. The kernels only guard the context, whose slots die row by row.
    q = jnp.where(alive, q, 0)
    if in_block:
        draft = tuple(jnp.where(alive, x, 0) for x in draft)
    if context is None:
        # A draft block knows nothing of its row: the anchors of all rows are tiled as those of one.
        q, draft = q.reshape(1, -1, *shape[2:]), tuple(x.reshape(1, -1, *x.shape[2:]) for x in draft)
        start, segments = jnp.zeros(1, jnp.int32), None
    plan = _plan(choice, q, context, draft, segments, bidirectional, scale)
    if in_block:
        draft = tuple(tiles.fold_draft(plan, x) for x in draft)
    out = _attend(plan, choice, tiles.fold(plan, q), context, draft, segments, start)
    out = tiles.unfold(plan, out).reshape(shape)
    out = jnp.where(alive, out, 0)
    return out if in_block else out[:, :, 0]


def _plan(choice, q, context, draft, segments, bidirectional, scale) -> tiles.Tiling:
    B, T, J, N, H = q.shape
    K = context[0].shape[1] if context is not None else draft[0].shape[3]
    S = 0 if context is None else context[0].shape[2]
    per_anchor = J * (N // K)
    size = tuning.pick(tuning.AttentionBlocks, choice.platform, q.dtype, T * per_anchor)
    gpu = choice.platform == "cuda"
    return tiles.Tiling(
        B, T, J, N, K, H, S,
        draft=draft is not None,
        segments=segments is not None,
        bidirectional=bidirectional,
        scale=scale,
        bt=min(T, max(1, size.rows // per_anchor)),
        bs=size.slots if gpu or size.slots < S else max(S, 1),
        power_of_two=gpu,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan, choice, q, context, draft, segments, start):
    forward = _body(choice).forward
    return forward(plan, q, context, draft, segments, start, save_sums=False, interpret=choice.interpret)[0]


def _attend_forward(plan, choice, q, context, draft, segments, start):
    body = _body(choice)
    out, sums = body.forward(plan, q, context, draft, segments, start, save_sums=True, interpret=choice.interpret)
    return out, (q, context, draft, segments, start, out, sums)


def _attend_backward(plan, choice, saved, dout):
    q, context, draft, segments, start, out, sums = saved
    delta = tiles.fold_sums(plan, jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1))
    gradients = _body(choice).backward(
        plan, q, context, draft, segments, start, sums, delta, dout, interpret=choice.interpret
    )
    return *gradients, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _body(choice: Choice):
    """The kernel bodies of a platform, imported when first used."""
    if choice.platform == "cuda":
        from pallas_kernels.attention import gpu as body
    else:
        from pallas_kernels.attention import tpu as body
    return body


def _check(q, context, draft, start, segments, transposed_keys) -> None:
    """Raises ValueError with the rule that the shapes break."""
    if context is None and draft is None:
        raise ValueError("attention needs a context, a draft block or both")
    if q.ndim != (4 if draft is None else 5):
        raise ValueError(f"q must be [B, T, N, H], or [B, T, J, N, H] with a draft block; got {q.shape}")
    B, T, *_, N, H = q.shape
    if start.shape != (B,):
        raise ValueError(f"start must be [B] = [{B}], got {start.shape}")
    heads = []
    if context is not None:
        k, v = context
        keys = (*v.shape[:2], v.shape[-1], v.shape[-2]) if transposed_keys else v.shape
        if k.shape != keys or v.ndim != 4 or v.shape[0] != B or v.shape[3] != H:
            keys = "[B, K, H, S] and " if transposed_keys else "two "
            raise ValueError(f"context must be {keys}[B={B}, K, S, H={H}], got {k.shape} and {v.shape}")
        heads.append(v.shape[1])
    if draft is not None:
        k, v = draft
        if k.shape != v.shape or k.ndim != 5 or k.shape[:3] != q.shape[:3] or k.shape[4] != H:
            raise ValueError(f"draft must be two {(*q.shape[:3], 'K', H)}, got {k.shape} and {v.shape}")
        heads.append(k.shape[3])
    if any(N % h for h in heads) or len(set(heads)) > 1:
        raise ValueError(f"{N} query heads cannot be grouped over {heads} key/value heads")
    if segments is not None:
        if segments.shape != (B, T):
            raise ValueError(f"segments must be [B, T] = {(B, T)}, got {segments.shape}")
        if transposed_keys:
            raise ValueError("packed documents have their keys as [B, K, S, H], not transposed")
        if context is not None and context[0].shape[2] != T:
            raise ValueError(f"packed documents need T == S, got {T} and {context[0].shape[2]}")
