"""Attention mixes the values of the visible keys, weighted by a kernel of the scores, for every head by itself.

    o_nh = Σ_m kernel(scale q_nh · k_mg, mask)_hnm v_mg

Specification: refimpl/ops/attention.py. From opset 23 on, softmax over several heads in float32 is ONNX's Attention,
which in ONNX Runtime takes no sequence without a token; everything else is two products around the kernel.
"""

import math
from collections.abc import Callable

import numpy as np

from export import check
from export.graph import Value, arange, cumsum, function, maximum, op, opset
from export.ops import attention_kernel, rope
from export.special import scaled


@function
def key_mask(valid: Value) -> Value:
    """The mask that hides padded keys from every query; `valid` is True on real tokens."""
    return _valid("attention.key_mask", valid)[..., None, :]


@function
def causal_mask(n: int | Value, m: int | Value) -> Value:
    """The mask of n queries that are the last n of m tokens; lengths are numbers or int64 scalars of the graph."""
    for name, length in (("n", n), ("m", m)):
        check.domain(
            "attention.causal_mask", isinstance(length, Value) or length >= 0, "lengths >= 0", **{name: length}
        )
    return arange(m) <= arange(n)[:, None] + (m - n)


@function
def unilm_mask(segment_ids: Value) -> Value:
    """The mask of a sequence-to-sequence model in one stack: segment 0 sees itself whole, segment 1 is causal."""
    ids = check.integer("attention.unilm_mask", "segment_ids", segment_ids)
    check.shape("attention.unilm_mask", ids.ndim >= 1, "segment_ids (..., n)", segment_ids=ids)
    count = cumsum(ids, axis=-1)
    return count[..., None, :] <= count[..., :, None]


@function
def per_head(mask: Value) -> Value:
    """The same mask for every head: inserts the head axis that `attend` expects."""
    mask = check.boolean("attention.per_head", "mask", mask)
    check.shape("attention.per_head", mask.ndim >= 2, "a mask (..., n, m)", mask=mask)
    return mask[..., None, :, :]


@function
def positions_from_mask(valid: Value) -> Value:
    """Positions that count real tokens only, from 0, wherever the padding stands."""
    valid = _valid("attention.positions_from_mask", valid)
    return maximum(cumsum(valid.cast(np.int64), axis=-1) - 1, 0)


@function
def attend(q: Value, k: Value, v: Value, mask: Value | None, *, kernel: Callable[..., Value], scale: float) -> Value:
    """Multi-head attention; with fewer key heads than query heads, grouped attention."""
    operation = "attention.attend"
    for name, x in (("q", q), ("k", k), ("v", v)):
        check.real(operation, name, x)
    expected = "q (*b, n, h, d), k (*b, m, g, d), v (*b, m, g, d_v) with h a multiple of g"
    fits = min(q.ndim, k.ndim, v.ndim) >= 3 and check.same(k.shape[:-1], v.shape[:-1])
    fits = fits and check.same(q.shape[:-3], k.shape[:-3]) and int(q.shape[-1]) == int(k.shape[-1])
    fits = fits and int(k.shape[-2]) == int(v.shape[-2]) and _divides(int(k.shape[-2]), int(q.shape[-2]))
    check.shape(operation, fits, expected, q=q, k=k, v=v)
    check.domain(operation, math.isfinite(scale), "a finite scale", scale=scale)
    if mask is not None:
        check.boolean(operation, "mask", mask)
        shape = (*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3])
        fits = check.same(mask.shape, shape[-2:]) or mask.ndim == q.ndim and check.broadcasts(mask.shape, shape)
        check.shape(operation, fits, "a mask (n, m), or (*b, h, n, m) with lengths or 1", q=q, k=k, mask=mask)
    # ONNX Runtime's operator gains on plain products by sharing out the heads; with one there is nothing to share.
    several = q.ndim == 4 and int(q.shape[-2]) > 1 and q.dtype == np.float32
    if opset() >= 23 and several and kernel is attention_kernel.softmax and scale > 0:
        return _by_operator(q, k, v, mask, scale)
    return _by_products(q, k, v, mask, kernel, scale)


@function
def attend_rotated_values(
    q: Value,
    k: Value,
    v: Value,
    angles_k: Value,
    mask: Value | None,
    *,
    rotate: Callable[..., Value],
    kernel: Callable[..., Value],
    scale: float,
) -> Value:
    """Attention whose values carry the position of their key; q and k come rotated, v does not."""
    operation = "attention.attend_rotated_values"
    check.real(operation, "angles_k", angles_k)
    check.shape(operation, angles_k.ndim >= 2, "angles_k (..., m, r)", angles_k=angles_k)
    return attend(q, k, rotate(v, angles_k[..., None, :]), mask, kernel=kernel, scale=scale)


@function
def project(x: Value, w: Value, b: Value | None) -> Value:
    """A dense layer on row vectors; W is (in, out)."""
    check.real("attention.project", "x", x)
    check.real("attention.project", "w", w)
    expected = "x (..., in), w (in, out), b (out,)"
    fits = x.ndim >= 1 and w.ndim == 2 and int(x.shape[-1]) == int(w.shape[0])
    check.shape("attention.project", fits, expected, x=x, w=w)
    if b is None:
        return x @ w
    check.real("attention.project", "b", b)
    check.shape("attention.project", b.ndim == 1 and int(b.shape[0]) == int(w.shape[1]), expected, x=x, w=w, b=b)
    return x @ w + b


@function
def multi_head_attention(
    x: Value,
    mask: Value | None,
    positions: Value | None,
    frequencies: Value | None,
    w_q: Value,
    b_q: Value | None,
    w_k: Value,
    b_k: Value | None,
    w_v: Value,
    b_v: Value | None,
    w_o: Value,
    b_o: Value | None,
    *,
    heads: int,
    rotate: Callable[..., Value],
    kernel: Callable[..., Value],
) -> Value:
    """Self-attention with its projections and rotary positions: `cross_attention` of x with itself."""
    weights = (w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o)
    return cross_attention(
        x, x, mask, positions, positions, frequencies, *weights, heads=heads, rotate=rotate, kernel=kernel
    )


@function
def cross_attention(
    x: Value,
    memory: Value,
    mask: Value | None,
    positions_q: Value | None,
    positions_k: Value | None,
    frequencies: Value | None,
    w_q: Value,
    b_q: Value | None,
    w_k: Value,
    b_k: Value | None,
    w_v: Value,
    b_v: Value | None,
    w_o: Value,
    b_o: Value | None,
    *,
    heads: int,
    rotate: Callable[..., Value],
    kernel: Callable[..., Value],
) -> Value:
    """Attention of the queries of x over the keys and values of `memory`, with projections."""
    operation = "attention.cross_attention"
    check.domain(operation, heads >= 1, "heads >= 1", heads=heads)
    q, k, v = project(x, w_q, b_q), project(memory, w_k, b_k), project(memory, w_v, b_v)
    columns_q, columns_k, columns_v = (int(w.shape[-1]) for w in (w_q, w_k, w_v))
    width = columns_q // heads
    groups = columns_k // max(width, 1)
    whole = width >= 1 and groups >= 1 and columns_q == heads * width and columns_k == groups * width
    expected = f"columns of w_q in {heads} heads, of w_k in heads of that width, of w_v in as many heads as w_k"
    check.shape(operation, whole and columns_v % groups == 0, expected, w_q=w_q, w_k=w_k, w_v=w_v)
    q, k, v = _split(q, heads), _split(k, groups), _split(v, groups)
    q = _rotated(operation, "positions_q", q, positions_q, frequencies, rotate)
    k = _rotated(operation, "positions_k", k, positions_k, frequencies, rotate)
    o = attend(q, k, v, mask, kernel=kernel, scale=1 / math.sqrt(width))
    return project(_joined(o), w_o, b_o)


def _by_operator(q: Value, k: Value, v: Value, mask: Value | None, scale: float) -> Value:
    """ONNX's Attention on (b, n, heads · width): query heads share a key head with their neighbours there too."""
    if mask is not None:
        # ONNX Runtime wants a row of the mask for every query.
        mask = mask.broadcast_to(*(1,) * (mask.ndim - 2), q.size(1), k.size(1))
    heads, groups, width = int(q.shape[-2]), int(k.shape[-2]), int(v.shape[-1])
    q, k, v = _joined(q), _joined(k), _joined(v)
    shape = (*q.shape[:-1], heads * width)
    o = op("Attention", q, k, v, mask, q_num_heads=heads, kv_num_heads=groups, scale=scale, shape=shape)
    return _split(o, heads)


def _by_products(q: Value, k: Value, v: Value, mask: Value | None, kernel: Callable[..., Value], scale: float) -> Value:
    heads, groups, axes = int(q.shape[-2]), int(k.shape[-2]), range(q.ndim)
    # Keys as columns: (*b, g, d, m).
    columns, values = k.transpose(*axes[:-3], -2, -1, -3), v.swap(-3, -2)
    rows = scaled(q.swap(-3, -2), scale)
    if heads == groups:
        return (kernel(rows @ columns, mask) @ values).swap(-3, -2)
    # The queries of the heads that share a key head are the rows of one product.
    lead = [q.size(axis) for axis in axes[:-3]]
    n, m, share = q.size(-3), k.size(-3), heads // groups
    rows = rows.reshape(*lead, groups, n * share, int(q.shape[-1]))
    weights = kernel((rows @ columns).reshape(*lead, heads, n, m), mask)
    mixed = weights.reshape(*lead, groups, n * share, m) @ values
    return mixed.reshape(*lead, heads, n, int(v.shape[-1])).swap(-3, -2)


def _valid(operation: str, valid: Value) -> Value:
    valid = check.boolean(operation, "valid", valid)
    check.shape(operation, valid.ndim >= 1, "valid (..., n)", valid=valid)
    return valid


def _divides(divisor: int, number: int) -> bool:
    return number == 0 if divisor == 0 else number % divisor == 0


def _split(x: Value, heads: int) -> Value:
    return x.regroup(1, heads, int(x.shape[-1]) // heads)


def _joined(x: Value) -> Value:
    """Heads side by side in one axis."""
    return x.regroup(2, int(x.shape[-2]) * int(x.shape[-1]))


def _rotated(
    operation: str,
    name: str,
    x: Value,
    positions: Value | None,
    frequencies: Value | None,
    rotate: Callable[..., Value],
) -> Value:
    lacking = positions is not None and frequencies is None
    check.domain(operation, not lacking, f"frequencies for {name}", frequencies=frequencies)
    if positions is None or frequencies is None:
        return x
    return rotate(x, rope.angles(positions, frequencies)[..., None, :])
