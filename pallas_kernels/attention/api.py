"""Mixed-mask attention: a ragged causal context and a bidirectional draft block in one softmax."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, tuning
from pallas_kernels.attention import reference, tiles
from pallas_kernels.attention.places import Pages
from pallas_kernels.attention.tiles import Context, Draft
from pallas_kernels.dispatch import Choice, Implementation

_PAGES = 8  # how many pages a context tile holds on TPU at most: each of them is an operand of its own


def mixed_mask_attention(
    q: Float[Array, "B T *J N H"],
    context: Context | Pages | None,
    draft: Draft | None = None,
    *,
    start: Int[Array, " B"],
    segments: Int[Array, "B T"] | None = None,
    bidirectional: bool = True,
    table: Int[Array, "B tables"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T *J N H"]:
    """softmax(q k^T / sqrt(H)) v under `may_attend`, scores and sums in float32.

    Three forms:
      decode: q is T tokens of each row that follow one another, the last one and its drafts or a piece of a prompt;
        `context` holds their own keys and values already, at positions start .. start + T - 1.
      full sequence: start = 0, T == C, packed documents by `segments`; differentiable.
      draft block: J drafts for each anchor t (SpecFormer's DBA); with `context`, in the same softmax, also everything
        the anchor may attend. Differentiable.

    Args:
      q: the queries of each token, or with a draft block those of each anchor's draft slots.
      context: None or the keys and values that the rows have so far, head-major; every key/value head serves the same
        number of query heads.
      draft: None or the keys and values of the draft slots.
      start: the absolute position of each row's first anchor; anchor t sits at start + t and attends the positions of
        the context up to that one. A negative start marks an empty row: its output is zero.
      segments: None or each token's document, where start is 0; 0 is padding, its output is zero.
      bidirectional: False makes the draft block causal over its slots (the paper's ablation, Table 4).
      table: None or, where `context` is pages [P, K, p, H], those that hold each row, in the order of its positions:
        C = tables * p, without segments. Entries that a row does not use yet may be any page. Without a gradient.
      implementation: None, "pallas", "mosaic_gpu" (plain queries over pages) or "xla"; see `dispatch`.

    Returns:
      What each query attends to, in the dtype of q. What no query may attend (positions past the end, padding, empty
      rows) never reaches the output; in the kernels not even a NaN (in the reference, positions past the end must be
      finite where the context is not paged).

    Raises:
      ValueError: shapes that do not fit together.
      NotImplementedError: a kernel was named where it cannot run, or a gradient over pages was asked for; it says why.
    """
    _check(q, context, draft, start, segments, table)
    p = None if table is None else context[0].shape[2]
    choice = dispatch.why(
        implementation,
        unsupported=why_no_kernel((q, context, draft), p),
        no_native=dispatch.NO_NATIVE_BODY,
        no_mosaic_gpu=why_no_mosaic_gpu(q, context, p) if draft is None else "a draft block has no Mosaic GPU body",
    )
    if table is not None:
        q, context, draft = _without_gradient((q, context, draft))
    attend = reference.attend if choice.implementation == "xla" else functools.partial(_kernel, choice)
    return attend(q, context, draft, start, segments, table, bidirectional=bidirectional)


def why_no_kernel(operands, p: int | None) -> str | None:
    """The reason why the kernels cannot take these queries, keys and values in pages of p positions, None if they can.

    p is None where the context is not paged.
    """
    dtypes = {x.dtype.name for x in jax.tree.leaves(operands)}
    if len(dtypes) > 1:
        return f"queries, keys and values have different dtypes: {sorted(dtypes)}"
    if p is not None and (p < 16 or p & (p - 1)):
        return f"pages hold {p} positions, not a power of two from 16 on"
    return None


def why_no_mosaic_gpu(q, context, p: int | None) -> str | None:
    """The reason why the Mosaic GPU body cannot take these queries, keys and values, as `why_no_kernel` has them."""
    if p is None:
        return "only attention over pages has a Mosaic GPU body"
    if {x.dtype.name for x in (q, *context)} != {"bfloat16"}:
        return dispatch.NOT_BFLOAT16
    K, H = context[0].shape[1], q.shape[-1]
    if H not in (64, 128):
        return f"heads of the Mosaic GPU body are 64 or 128 wide, not {H}"
    if p < 64 or p & (p - 1):
        return f"pages hold {p} positions, not a power of two from 64 on as the Mosaic GPU body reads them"
    group = q.shape[-2] // K
    return None if group <= 64 else f"{group} query heads share a key/value head, more than the 64 rows of a product"


@jax.custom_vjp
def _without_gradient(operands):
    return operands


def _no_gradient(*_):
    raise NotImplementedError("attention over pages is for decoding and has no gradient: training packs documents")


_without_gradient.defvjp(_no_gradient, _no_gradient)


def _kernel(choice: Choice, q, context, draft, start, segments, table, *, bidirectional: bool) -> jax.Array:
    """Folds the operands for the kernel bodies, and what they return back."""
    in_block = draft is not None
    if not in_block:
        q = q[:, :, None]
    shape = q.shape
    alive = jnp.broadcast_to(start[:, None] >= 0, shape[:2])
    if segments is not None:
        alive = alive & (segments != 0)
    alive = alive[:, :, None, None, None]
    # Dead anchors may hold NaN. The kernels only guard the context, whose positions die row by row.
    q = jnp.where(alive, q, 0)
    if in_block:
        draft = tuple(jnp.where(alive, x, 0) for x in draft)
    if context is None:
        # A draft block knows nothing of its row: the anchors of all rows are tiled as those of one.
        q, draft = q.reshape(1, -1, *shape[2:]), tuple(x.reshape(1, -1, *x.shape[2:]) for x in draft)
        start, segments = jnp.zeros(1, jnp.int32), None
    plan = _plan(choice, q, context, draft, segments, table, bidirectional)
    if in_block:
        draft = tuple(tiles.fold_draft(plan, x) for x in draft)
    out = _attend(plan, choice, tiles.fold(plan, q), context, draft, segments, start, table)
    out = tiles.unfold(plan, out).reshape(shape)
    out = jnp.where(alive, out, 0)
    return out if in_block else out[:, :, 0]


def _plan(choice: Choice, q, context, draft, segments, table, bidirectional: bool) -> tiles.Tiling:
    B, T, J, N, H = q.shape
    K = context[0].shape[1] if context is not None else draft[0].shape[3]
    p = 0 if table is None else context[0].shape[2]
    C = table.shape[1] * p if p else 0 if context is None else context[0].shape[2]
    per_anchor = J * (N // K)
    size = tuning.pick(tuning.AttentionBlocks, choice.body, q.dtype, T * per_anchor)
    gpu = choice.platform == "cuda"
    positions = size.positions if gpu or size.positions < C else max(C, 1)
    if p:
        positions = min(size.positions, p) if gpu else p * max(1, min(positions // p, _PAGES))
    return tiles.Tiling(
        B, T, J, N, K, H, C,
        draft=draft is not None,
        segments=segments is not None,
        bidirectional=bidirectional,
        anchors=min(T, max(1, size.rows // per_anchor)),
        positions=positions,
        p=p,
        power_of_two=gpu,
        least_rows=64 if choice.body == "mosaic_gpu" else 16,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan, choice, q, context, draft, segments, start, table):
    forward, _ = _passes(choice)
    return forward(plan, q, context, draft, segments, start, table, save_sums=False, interpret=choice.interpret)[0]


def _attend_forward(plan, choice, q, context, draft, segments, start, table):
    forward, _ = _passes(choice)
    out, sums = forward(plan, q, context, draft, segments, start, table, save_sums=True, interpret=choice.interpret)
    return out, (q, context, draft, segments, start, out, sums)


def _attend_backward(plan, choice, saved, dout):
    q, context, draft, segments, start, out, sums = saved
    _, backward = _passes(choice)
    delta = tiles.fold_sums(plan, jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1))
    incoming = tiles.Incoming(dout, sums, delta)
    gradients = backward(plan, q, context, draft, segments, start, incoming, interpret=choice.interpret)
    return *gradients, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _passes(choice: Choice):
    """The forward and backward kernels of a platform, imported when first used."""
    if choice.body == "mosaic_gpu":
        from pallas_kernels.attention.hopper import forward

        backward = None  # pages have no gradient
    elif choice.platform == "cuda":
        from pallas_kernels.attention.gpu import backward, forward
    else:
        from pallas_kernels.attention.tpu_backward import backward
        from pallas_kernels.attention.tpu_forward import forward
    return forward, backward


def _check(q, context, draft, start, segments, table) -> None:
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
        if k.shape != v.shape or v.ndim != 4 or v.shape[3] != H or (table is None and v.shape[0] != B):
            sizes = f"[B={B}, K, C, H={H}]" if table is None else f"[P, K, p, H={H}] with a table"
            raise ValueError(f"context must be two {sizes}, got {k.shape} and {v.shape}")
        heads.append(v.shape[1])
    if draft is not None:
        k, v = draft
        if k.shape != v.shape or k.ndim != 5 or k.shape[:3] != q.shape[:3] or k.shape[4] != H:
            raise ValueError(f"draft must be two {(*q.shape[:3], 'K', H)}, got {k.shape} and {v.shape}")
        heads.append(k.shape[3])
    if any(N % h for h in heads) or len(set(heads)) > 1:
        raise ValueError(f"{N} query heads cannot be grouped over {heads} key/value heads")
    if table is not None:
        if context is None or segments is not None:
            raise ValueError("a table is for a context of pages, without segments")
        if table.ndim != 2 or table.shape[0] != B:
            raise ValueError(f"table must be [B={B}, tables], got {table.shape}")
    if segments is not None:
        if segments.shape != (B, T):
            raise ValueError(f"segments must be [B, T] = {(B, T)}, got {segments.shape}")
        if context is not None and context[0].shape[2] != T:
            raise ValueError(f"packed documents need T == C, got {T} and {context[0].shape[2]}")
