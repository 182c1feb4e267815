"""Attention mixes the values of the visible keys, weighted by a kernel of the scores, for every head by itself.

    o_nh = Σ_m kernel(scale q_nh · k_mg, mask)_hnm v_mg

Source: arXiv:1706.03762, section 3.2; grouped heads arXiv:2305.13245; rotary positions arXiv:2104.09864

Heads are the last axis but one: q (b, n, h, d), k (b, m, g, d), v (b, m, g, d_v). Masks are boolean, True = may attend.
`key_mask`, `causal_mask` and `unilm_mask` have no head axis, are combined with &, and `per_head` inserts that axis.

Positions are arguments, so that padding may stand on either side: hide padded keys with `key_mask`, count positions
with `positions_from_mask`. In cross attention positions_q and positions_k are separate, and None rotates nothing:
Hugging Face RoFormer rotates neither side, JunnYu/RoFormer_pytorch the queries only.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from refimpl import check
from refimpl.ops import rope


def key_mask(valid: Shaped[np.ndarray, "*b m"]) -> Bool[np.ndarray, "*b 1 m"]:
    """The mask that hides padded keys from every query; `valid` is True on real tokens.

    mask_bnm = valid_bm

    C1. Keys must be hidden, not queries: the query of a padded token still has a defined row.
    Raises: DomainError unless boolean; ShapeError without a token axis.
    """
    return _valid("attention.key_mask", valid)[..., None, :]


def causal_mask(n: int, m: int) -> Bool[np.ndarray, "n m"]:
    """The mask of n queries that are the last n of m tokens: aligned at the end.

    mask_ij = (j <= i + m - n)

    C1. The last query must see every key; n = m must give the lower triangle with its diagonal.
    C2. For n > m the first n - m rows must be fully masked.
    Raises: DomainError for a negative length.
    Source: FlashAttention since 2.1 (bottom right).
    Differs: torch scaled_dot_product_attention(is_causal=True) aligns at the start, mask_ij = (j <= i); ONNX Attention
        offsets by the length of its cache, so without a cache it aligns at the start. For n = m all agree.
    """
    check.domain("attention.causal_mask", n >= 0 and m >= 0, "lengths >= 0", n=n, m=m)
    return np.arange(m) <= np.arange(n)[:, None] + (m - n)


def unilm_mask(segment_ids: Shaped[np.ndarray, "*b n"]) -> Bool[np.ndarray, "*b n n"]:
    """The mask of a sequence-to-sequence model in one stack: segment 0 sees itself whole, segment 1 is causal.

    mask_bij = (c_bj <= c_bi),   c_bi = Σ_(l <= i) segment_ids_bl

    C1. A token of segment 0 must see all of the prefix and nothing of segment 1.
    C2. A token of segment 1 must see the prefix, itself and what precedes it.
    C3. Zeros after the last 1, as padding, share the count of that 1: hide them with `key_mask`.
    Raises: DomainError for ids other than 0 and 1; ShapeError without a token axis.
    Source: arXiv:1905.03197; bert4keras (application = unilm).
    """
    ids = check.integer("attention.unilm_mask", "segment_ids", segment_ids)
    check.shape("attention.unilm_mask", ids.ndim >= 1, "segment_ids (..., n)", segment_ids=ids)
    others = ids[(ids != 0) & (ids != 1)]
    check.domain("attention.unilm_mask", others.size == 0, "ids 0 and 1", segment_ids=others[:3].tolist())
    count = ids.cumsum(axis=-1)
    return count[..., None, :] <= count[..., :, None]


def per_head(mask: Shaped[np.ndarray, "*b n m"]) -> Bool[np.ndarray, "*b 1 n m"]:
    """The same mask for every head: inserts the head axis that `attend` expects.

    C1. Only the third axis from the right must be new.
    Raises: DomainError unless boolean; ShapeError for fewer than two axes.
    """
    mask = check.boolean("attention.per_head", "mask", mask)
    check.shape("attention.per_head", mask.ndim >= 2, "a mask (..., n, m)", mask=mask)
    return mask[..., None, :, :]


def positions_from_mask(valid: Shaped[np.ndarray, "*b n"]) -> Int[np.ndarray, "*b n"]:
    """Positions that count real tokens only, from 0, wherever the padding stands.

    positions_bi = max(Σ_(l <= i) valid_bl - 1, 0)

    C1. The first real token must be at 0 and real tokens must count up by 1.
    C2. A padded token must have the position of the last real token before it, or 0.
    Raises: DomainError unless boolean; ShapeError without a token axis.
    Differs: bert4keras counts from the start of the array, which only right padding survives.
    """
    valid = _valid("attention.positions_from_mask", valid)
    return np.maximum(valid.cumsum(axis=-1) - 1, 0)


def attend(
    q: Shaped[np.ndarray, "*b n h d"],
    k: Shaped[np.ndarray, "..."],
    v: Shaped[np.ndarray, "..."],
    mask: Shaped[np.ndarray, "..."] | None,
    *,
    kernel: Callable[..., np.ndarray],
    scale: float,
) -> Float[np.ndarray, "*b n h _"]:
    """Multi-head attention; with fewer key heads than query heads, grouped attention.

    o_bnhe = Σ_m kernel(scale Σ_d q_bnhd k_bmgd, mask)_bhnm v_bmge,   g = h // (heads of q / heads of k)

    C1. Query head h must use key and value head h // (heads of q / heads of k): neighbours share, not every g-th head.
    C2. A fully masked row must give zeros; the value of a masked key must not matter.
    C3. The mask must have the axes (b, h, n, m), each its length or 1, or be exactly (n, m); None hides nothing.
        A (b, n, m) mask is refused: broadcast, its batch axis would be read as heads. Use `per_head`.
    C4. The scores must be scaled before the kernel, which counts and masks.
    Raises: ShapeError for other shapes or heads of q no multiple of those of k; DomainError for NaN, infinity, masks.
    Precision: scores against |scale| Σ|q||k|, then the kernel's own condition, then Σ|weights||v|.
    Source: arXiv:1706.03762, equation 1 with scale = 1/√d; arXiv:2305.13245.
    """
    q, k, v = (check.real("attention.attend", name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    fits = min(q.ndim, k.ndim, v.ndim) >= 3 and k.shape[:-1] == v.shape[:-1]
    fits = fits and q.shape[:-3] == k.shape[:-3] and q.shape[-1] == k.shape[-1]
    expected = "q (*b, n, h, d), k (*b, m, g, d), v (*b, m, g, d_v) with h a multiple of g"
    check.shape("attention.attend", fits and _divides(k.shape[-2], q.shape[-2]), expected, q=q, k=k, v=v)
    check.domain("attention.attend", math.isfinite(scale), "a finite scale", scale=scale)
    if mask is not None:
        shape = (*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3])
        mask = check.boolean("attention.attend", "mask", mask)
        fits = mask.ndim == len(shape) or mask.shape == shape[-2:]
        check.shape("attention.attend", fits, f"a mask {shape[-2:]}, or {shape} with lengths or 1", mask=mask)
    share = q.shape[-2] // max(k.shape[-2], 1)
    k, v = np.repeat(k, share, axis=-2), np.repeat(v, share, axis=-2)
    weights = kernel(np.einsum("...nhd,...mhd->...hnm", q, k) * scale, mask)
    return np.einsum("...hnm,...mhe->...nhe", weights, v)


def attend_rotated_values(
    q: Shaped[np.ndarray, "*b n h d"],
    k: Shaped[np.ndarray, "..."],
    v: Shaped[np.ndarray, "..."],
    angles_k: Shaped[np.ndarray, "..."],
    mask: Shaped[np.ndarray, "..."] | None,
    *,
    rotate: Callable[..., np.ndarray],
    kernel: Callable[..., np.ndarray],
    scale: float,
) -> Float[np.ndarray, "*b n h _"]:
    """Attention whose values carry the position of their key; q and k come rotated, v does not.

    o_n = Σ_m weights_nm R_m v_m

    C1. `rotate` must leave every pair where it stood: a permuted layout cancels in scores, not in values.
    C2. A common shift t of all positions must turn the output into R_t o; rotate(o, -angles_q) undoes it, and that
        R_(-n) o_n depends on relative positions only.
    Raises: as `attend` and `rotate`; angles_k (..., m, r) carry no head axis.
    Precision: as `attend`, with a rotated |v|.
    Source: Hugging Face RoFormer with rotary_value = True, which does not rotate back.
    """
    angles_k = check.real("attention.attend_rotated_values", "angles_k", angles_k)
    check.shape("attention.attend_rotated_values", angles_k.ndim >= 2, "angles_k (..., m, r)", angles_k=angles_k)
    return attend(q, k, rotate(v, angles_k[..., None, :]), mask, kernel=kernel, scale=scale)


def project(
    x: Shaped[np.ndarray, "*b d"], w: Shaped[np.ndarray, "..."], b: Shaped[np.ndarray, "..."] | None
) -> Float[np.ndarray, "*b _"]:
    """A dense layer on row vectors.

    y = x W + b

    C1. W must be (in, out): Keras' order, the transpose of torch's Linear.weight. b = None must add nothing.
    Raises: ShapeError for shapes that do not fit; DomainError for NaN or infinity.
    Precision: against Σ|x||W| + |b|.
    """
    x, w = check.real("attention.project", "x", x), check.real("attention.project", "w", w)
    expected = "x (..., in), w (in, out), b (out,)"
    check.shape("attention.project", x.ndim >= 1 and w.ndim == 2 and x.shape[-1:] == w.shape[:1], expected, x=x, w=w)
    if b is None:
        return x @ w
    b = check.real("attention.project", "b", b)
    check.shape("attention.project", b.shape == w.shape[1:], expected, x=x, w=w, b=b)
    return x @ w + b


def multi_head_attention(
    x: Shaped[np.ndarray, "*b n d"],
    mask: Shaped[np.ndarray, "..."] | None,
    positions: Shaped[np.ndarray, "..."] | None,
    frequencies: Shaped[np.ndarray, " r"] | None,
    w_q: Shaped[np.ndarray, "..."],
    b_q: Shaped[np.ndarray, "..."] | None,
    w_k: Shaped[np.ndarray, "..."],
    b_k: Shaped[np.ndarray, "..."] | None,
    w_v: Shaped[np.ndarray, "..."],
    b_v: Shaped[np.ndarray, "..."] | None,
    w_o: Shaped[np.ndarray, "..."],
    b_o: Shaped[np.ndarray, "..."] | None,
    *,
    heads: int,
    rotate: Callable[..., np.ndarray],
    kernel: Callable[..., np.ndarray],
) -> Float[np.ndarray, "*b n _"]:
    """Self-attention with its projections and rotary positions: `cross_attention` of x with itself.

    y = attend(R(x W_q + b_q), R(x W_k + b_k), x W_v + b_v) W_o + b_o

    C1. All positions may shift by a constant; on real tokens, padding on either side must change nothing.
    Raises, Precision: as `cross_attention`.
    Source: arXiv:2104.09864, equation 16; RoFormer has all biases, RoFormerV2 none.
    """
    weights = (w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o)
    return cross_attention(
        x, x, mask, positions, positions, frequencies, *weights, heads=heads, rotate=rotate, kernel=kernel
    )


def cross_attention(
    x: Shaped[np.ndarray, "*b n d"],
    memory: Shaped[np.ndarray, "..."],
    mask: Shaped[np.ndarray, "..."] | None,
    positions_q: Shaped[np.ndarray, "..."] | None,
    positions_k: Shaped[np.ndarray, "..."] | None,
    frequencies: Shaped[np.ndarray, " r"] | None,
    w_q: Shaped[np.ndarray, "..."],
    b_q: Shaped[np.ndarray, "..."] | None,
    w_k: Shaped[np.ndarray, "..."],
    b_k: Shaped[np.ndarray, "..."] | None,
    w_v: Shaped[np.ndarray, "..."],
    b_v: Shaped[np.ndarray, "..."] | None,
    w_o: Shaped[np.ndarray, "..."],
    b_o: Shaped[np.ndarray, "..."] | None,
    *,
    heads: int,
    rotate: Callable[..., np.ndarray],
    kernel: Callable[..., np.ndarray],
) -> Float[np.ndarray, "*b n _"]:
    """Attention of the queries of x over the keys and values of `memory`, with projections.

    y = attend(R(x W_q + b_q), R(memory W_k + b_k), memory W_v + b_v, scale = 1/√width) W_o + b_o

    C1. Columns must be head-major: column head · width + j is feature j of that head, width = columns of W_q / heads.
    C2. The key heads are the columns of W_k / width; the values split among as many.
    C3. A side without positions must not be rotated. Values must not be rotated.
    C4. The frequencies belong to `rotate`: width/2 of them for a full rotation, whose base the caller chose.
    Raises: ShapeError where heads do not divide the columns or positions do not fit; DomainError for NaN or infinity.
    Precision: chained: projection, rotation (angle = position · frequency), `attend`, projection.
    Differs: see the module; bert4keras and Hugging Face scale by 1/√width, T5 by 1.
    """
    operation = "attention.cross_attention"
    check.domain(operation, heads >= 1, "heads >= 1", heads=heads)
    q, k, v = project(x, w_q, b_q), project(memory, w_k, b_k), project(memory, w_v, b_v)
    width = q.shape[-1] // heads
    groups = k.shape[-1] // max(width, 1)
    whole = width >= 1 and groups >= 1 and q.shape[-1] == heads * width and k.shape[-1] == groups * width
    expected = f"columns of w_q in {heads} heads, of w_k in heads of that width, of w_v in as many heads as w_k"
    whole = whole and v.shape[-1] % groups == 0
    check.shape(operation, whole, expected, w_q=np.asarray(w_q), w_k=np.asarray(w_k), w_v=np.asarray(w_v))
    q, k, v = _split(q, heads), _split(k, groups), _split(v, groups)
    q = _rotated(operation, "positions_q", q, positions_q, frequencies, rotate)
    k = _rotated(operation, "positions_k", k, positions_k, frequencies, rotate)
    o = attend(q, k, v, mask, kernel=kernel, scale=1 / math.sqrt(width))
    return project(o.reshape(*o.shape[:-2], o.shape[-2] * o.shape[-1]), w_o, b_o)


def _valid(operation: str, valid: np.ndarray) -> np.ndarray:
    valid = check.boolean(operation, "valid", valid)
    check.shape(operation, valid.ndim >= 1, "valid (..., n)", valid=valid)
    return valid


def _divides(divisor: int, number: int) -> bool:
    return number == 0 if divisor == 0 else number % divisor == 0


def _split(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def _rotated(
    operation: str,
    name: str,
    x: np.ndarray,
    positions: np.ndarray | None,
    frequencies: np.ndarray | None,
    rotate: Callable[..., np.ndarray],
) -> np.ndarray:
    lacking = positions is not None and frequencies is None
    check.domain(operation, not lacking, f"frequencies for {name}", frequencies=frequencies)
    if positions is None or frequencies is None:
        return x
    return rotate(x, rope.angles(positions, frequencies)[..., None, :])
