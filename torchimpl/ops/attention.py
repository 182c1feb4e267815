"""Attention mixes the values of the visible keys, weighted by a kernel of the scores, for every head by itself.

    o_nh = Σ_m kernel(scale q_nh · k_mg, mask)_hnm v_mg

Specification: refimpl/ops/attention.py. In 16 bits scores and kernels are float32. The weights return to the storage
format before they meet the values, except in float16, which squared weights leave at both ends: there Σ is float32.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from torchimpl import check, dense
from torchimpl.ops import attention_kernel, rope


def key_mask(valid: Bool[Tensor, "*b m"]) -> Bool[Tensor, "*b 1 m"]:
    """The mask that hides padded keys from every query; `valid` is True on real tokens.

    Raises: DomainError unless boolean; ShapeError without a token axis.
    """
    return _valid("attention.key_mask", valid)[..., None, :]


def causal_mask(n: int, m: int) -> Bool[Tensor, "n m"]:
    """The mask of n queries that are the last n of m tokens, on torch's default device: aligned at the end.

    Raises: DomainError for a negative length.
    """
    check.domain("attention.causal_mask", n >= 0 and m >= 0, "lengths >= 0", n=n, m=m)
    return torch.arange(m) <= torch.arange(n)[:, None] + (m - n)


def unilm_mask(segment_ids: Int[Tensor, "*b n"]) -> Bool[Tensor, "*b n n"]:
    """The mask of a sequence-to-sequence model in one stack: segment 0 sees itself whole, segment 1 is causal.

    Raises: DomainError unless integers (whether 0 and 1 is not looked at); ShapeError without a token axis.
    """
    ids = check.integer("attention.unilm_mask", "segment_ids", segment_ids)
    check.shape("attention.unilm_mask", ids.ndim >= 1, "segment_ids (..., n)", segment_ids=ids)
    count = ids.cumsum(dim=-1)
    return count[..., None, :] <= count[..., :, None]


def per_head(mask: Bool[Tensor, "*b n m"]) -> Bool[Tensor, "*b 1 n m"]:
    """The same mask for every head: inserts the head axis that `attend` expects.

    Raises: DomainError unless boolean; ShapeError for fewer than two axes.
    """
    mask = check.boolean("attention.per_head", "mask", mask)
    check.shape("attention.per_head", mask.ndim >= 2, "a mask (..., n, m)", mask=mask)
    return mask[..., None, :, :]


def positions_from_mask(valid: Bool[Tensor, "*b n"]) -> Int[Tensor, "*b n"]:
    """Positions that count real tokens only, from 0, wherever the padding stands.

    Raises: DomainError unless boolean; ShapeError without a token axis.
    """
    valid = _valid("attention.positions_from_mask", valid)
    return (valid.cumsum(dim=-1) - 1).clamp(min=0)


def attend(
    q: Float[Tensor, "*b n h d"],
    k: Float[Tensor, "..."],
    v: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | None,
    *,
    kernel: Callable[..., Tensor],
    scale: float,
) -> Float[Tensor, "*b n h _"]:
    """Multi-head attention; with fewer key heads than query heads, grouped attention.

    With attention_kernel.softmax itself for a kernel, torch's scaled_dot_product_attention does the work, which has
    exact zeros for masked weights and for fully masked rows as well.
    Raises: ShapeError for shapes that do not fit or heads of q no multiple of those of k; DomainError for dtypes or a
    scale that is not finite.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check.real("attention.attend", name, x)
    fits = min(q.ndim, k.ndim, v.ndim) >= 3 and k.shape[:-1] == v.shape[:-1]
    fits = fits and q.shape[:-3] == k.shape[:-3] and q.shape[-1] == k.shape[-1] and _divides(k.shape[-2], q.shape[-2])
    expected = "q (*b, n, h, d), k (*b, m, g, d), v (*b, m, g, d_v) with h a multiple of g"
    check.shape("attention.attend", fits, expected, q=q, k=k, v=v)
    check.domain("attention.attend", -math.inf < scale < math.inf, "a finite scale", scale=scale)
    if mask is not None:
        check.boolean("attention.attend", "mask", mask)
        lengths = (*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3])
        fits = mask.ndim == len(lengths) and check.broadcasts(mask.shape, lengths)
        fits = fits or tuple(mask.shape) == lengths[-2:]
        check.shape("attention.attend", fits, "a mask (n, m), or (*b, h, n, m) with lengths or 1", mask=mask, q=q, k=k)
    # Heads before tokens.
    q, k, v = q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)
    if kernel is attention_kernel.softmax:
        o = _attend_fused(q, k, v, mask, scale)
    else:
        o = _attend_plain(q, k, v, mask, kernel, scale)
    return o.transpose(-3, -2)


def attend_rotated_values(
    q: Float[Tensor, "*b n h d"],
    k: Float[Tensor, "..."],
    v: Float[Tensor, "..."],
    angles_k: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | None,
    *,
    rotate: Callable[..., Tensor],
    kernel: Callable[..., Tensor],
    scale: float,
) -> Float[Tensor, "*b n h _"]:
    """Attention whose values carry the position of their key; q and k come rotated, v does not.

    Raises: as `attend` and `rotate`; angles_k (..., m, r) carry no head axis.
    """
    check.real("attention.attend_rotated_values", "angles_k", angles_k)
    check.shape("attention.attend_rotated_values", angles_k.ndim >= 2, "angles_k (..., m, r)", angles_k=angles_k)
    return attend(q, k, rotate(v, angles_k[..., None, :]), mask, kernel=kernel, scale=scale)


def project(x: Float[Tensor, "*b d"], w: Float[Tensor, "..."], b: Float[Tensor, "..."] | None) -> Float[Tensor, "*b _"]:
    """A dense layer on row vectors, y = x W + b; W is (in, out), the transpose of torch's Linear.weight.

    Raises: ShapeError for shapes that do not fit; DomainError for tensors that are not floating.
    """
    for name, tensor in (("x", x), ("w", w)):
        check.real("attention.project", name, tensor)
    expected = "x (..., in), w (in, out), b (out,)"
    check.shape("attention.project", x.ndim >= 1 and w.ndim == 2 and x.shape[-1:] == w.shape[:1], expected, x=x, w=w)
    if b is not None:
        check.real("attention.project", "b", b)
        check.shape("attention.project", b.shape == w.shape[1:], expected, x=x, w=w, b=b)
    return dense.linear(x, w, b)


def multi_head_attention(
    x: Float[Tensor, "*b n d"],
    mask: Bool[Tensor, "..."] | None,
    positions: Int[Tensor, "..."] | None,
    frequencies: Float[Tensor, " r"] | None,
    w_q: Float[Tensor, "..."],
    b_q: Float[Tensor, "..."] | None,
    w_k: Float[Tensor, "..."],
    b_k: Float[Tensor, "..."] | None,
    w_v: Float[Tensor, "..."],
    b_v: Float[Tensor, "..."] | None,
    w_o: Float[Tensor, "..."],
    b_o: Float[Tensor, "..."] | None,
    *,
    heads: int,
    rotate: Callable[..., Tensor],
    kernel: Callable[..., Tensor],
) -> Float[Tensor, "*b n _"]:
    """Self-attention with its projections and rotary positions: `cross_attention` of x with itself.

    Raises: as `cross_attention`.
    """
    weights = (w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o)
    return cross_attention(
        x, x, mask, positions, positions, frequencies, *weights, heads=heads, rotate=rotate, kernel=kernel
    )


def cross_attention(
    x: Float[Tensor, "*b n d"],
    memory: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | None,
    positions_q: Int[Tensor, "..."] | None,
    positions_k: Int[Tensor, "..."] | None,
    frequencies: Float[Tensor, " r"] | None,
    w_q: Float[Tensor, "..."],
    b_q: Float[Tensor, "..."] | None,
    w_k: Float[Tensor, "..."],
    b_k: Float[Tensor, "..."] | None,
    w_v: Float[Tensor, "..."],
    b_v: Float[Tensor, "..."] | None,
    w_o: Float[Tensor, "..."],
    b_o: Float[Tensor, "..."] | None,
    *,
    heads: int,
    rotate: Callable[..., Tensor],
    kernel: Callable[..., Tensor],
) -> Float[Tensor, "*b n _"]:
    """Attention of the queries of x over the keys and values of `memory`, with projections and head-major columns.

    Raises: ShapeError where heads do not divide the columns or positions do not fit; DomainError for dtypes, heads < 1
    or positions without frequencies.
    """
    operation = "attention.cross_attention"
    check.domain(operation, heads >= 1, "heads >= 1", heads=heads)
    q, k, v = project(x, w_q, b_q), project(memory, w_k, b_k), project(memory, w_v, b_v)
    width = q.shape[-1] // heads
    groups = k.shape[-1] // max(width, 1)
    whole = width >= 1 and groups >= 1 and q.shape[-1] == heads * width and k.shape[-1] == groups * width
    expected = "columns of w_q in whole heads, of w_k in heads of that width, of w_v in as many heads as w_k"
    whole = whole and v.shape[-1] % groups == 0
    check.shape(operation, whole, expected, heads=heads, w_q=w_q, w_k=w_k, w_v=w_v)
    q, k, v = _split(q, heads), _split(k, groups), _split(v, groups)
    q = _rotated(operation, "positions_q", q, positions_q, frequencies, rotate)
    k = _rotated(operation, "positions_k", k, positions_k, frequencies, rotate)
    o = attend(q, k, v, mask, kernel=kernel, scale=1 / math.sqrt(width))
    return project(o.flatten(-2), w_o, b_o)


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """torch's fused softmax attention of q (*b, h, n, d)."""
    fused = functional.scaled_dot_product_attention
    # The flag must be a constant of the graph, which a comparison of open sizes is not.
    if q.shape[-3] == k.shape[-3]:
        return fused(q, k, v, attn_mask=mask, scale=scale)
    return fused(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def _attend_plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: Callable[..., Tensor], scale: float
) -> Tensor:
    """Scores, kernel, values; q (*b, h, n, d). The query heads of a group stand in one column, so no key is copied."""
    heads, n, m = q.shape[-3], q.shape[-2], k.shape[-2]
    groups = k.shape[-3]
    stacked = (check.island(q) * scale).reshape(*k.shape[:-2], heads // max(groups, 1) * n, q.shape[-1])
    scores = stacked @ check.island(k).mT
    weights = kernel(scores.reshape(*q.shape[:-1], m), mask).reshape(scores.shape)
    # bfloat16 has the range of float32, float16 has not.
    mixed = weights @ v.float() if v.dtype == torch.float16 else weights.to(v.dtype) @ v
    return mixed.reshape(*q.shape[:-1], v.shape[-1]).to(q.dtype)


def _valid(operation: str, valid: Tensor) -> Tensor:
    valid = check.boolean(operation, "valid", valid)
    check.shape(operation, valid.ndim >= 1, "valid (..., n)", valid=valid)
    return valid


def _divides(divisor: int, number: int) -> bool:
    return number == 0 if divisor == 0 else number % divisor == 0


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, x.shape[-1] // heads))


def _rotated(
    operation: str,
    name: str,
    x: Tensor,
    positions: Tensor | None,
    frequencies: Tensor | None,
    rotate: Callable[..., Tensor],
) -> Tensor:
    lacking = positions is not None and frequencies is None
    check.domain(operation, not lacking, f"frequencies for {name}", frequencies=frequencies)
    if positions is None or frequencies is None:
        return x
    return rotate(x, rope.angles(positions, frequencies)[..., None, :])
