"""From token vectors to decisions: classes, choices, and scores of every span (start, end).

global_pointer: scores[h, i, j] = <R_i q_i^h, R_j k_j^h> / sqrt(s) for i <= j with both tokens unmasked, -inf elsewhere

Source: kexue.fm/archives/8373 (GlobalPointer), /8877 (Efficient GlobalPointer), /8739 (the heads of the CLUE tasks).
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from refimpl import check
from refimpl.ops import rope


class Span(NamedTuple):
    """The best span of each score matrix: first and last token, both inclusive, and its score."""

    start: np.ndarray
    end: np.ndarray
    score: np.ndarray


def classify(
    x: Shaped[np.ndarray, "*b d"], kernel: Shaped[np.ndarray, "_d k"], bias: Shaped[np.ndarray, " _k"]
) -> Float[np.ndarray, "*b k"]:
    """The logits of k classes from one pooled vector.

    y = x kernel + bias

    C1. kernel must be read as (in, out).
    C2. The result must be logits: no softmax, no activation.
    Raises: ShapeError unless x is (..., d), kernel (d, k) and bias (k,).
    Precision: products and sum in float64; the budget is measured against abs(x) abs(kernel) + abs(bias).
    Source: kexue.fm/archives/8739.
    Differs: bert4keras ends in softmax; JunnYu's RoFormerV2 head puts a dense layer with relu in front.
    """
    return _dense("head.classify", x, kernel, bias)


def choose(
    x: Shaped[np.ndarray, "*b k d"],
    kernel: Shaped[np.ndarray, "_d 1"],
    bias: Shaped[np.ndarray, "1"],
    mask: Shaped[np.ndarray, "..."],
) -> Float[np.ndarray, "*b k"]:
    """One score per choice of a multiple-choice question, from one pooled vector per (question, choice) pair.

    y_k = <x_k, kernel> + bias where mask_k, -inf elsewhere

    C1. A masked choice must score -inf exactly, whatever x holds there.
    C2. Exchanging two choices must exchange their scores and change nothing else.
    C3. With every choice masked all scores must be -inf.
    Raises: ShapeError unless x is (..., k, d), kernel (d, 1), bias (1,), mask (..., k); DomainError for a mask that is
    not boolean.
    Precision: as classify.
    Source: kexue.fm/archives/8739 (c3, chid: softmax over the choices of a question).
    Differs: bert4keras pads missing choices with a stock answer, so that they compete; others use -1e4 or -1e12.
    """
    mask = check.boolean("head.choose", "mask", mask)
    scores = _dense("head.choose", x, kernel, bias)
    check.shape(
        "head.choose",
        scores.shape[-1] == 1 and mask.ndim >= 1 and mask.shape == scores.shape[:-1],
        "x (..., k, d), kernel (d, 1), bias (1,) and mask (..., k)",
        x=np.asarray(x),
        kernel=np.asarray(kernel),
        mask=mask,
    )
    return np.where(mask, scores[..., 0], -np.inf)


def global_pointer(
    x: Shaped[np.ndarray, "*b n d"],
    kernel: Shaped[np.ndarray, "_d _f"],
    bias: Shaped[np.ndarray, " _f"],
    mask: Shaped[np.ndarray, "..."],
    positions: Shaped[np.ndarray, "..."],
    *,
    heads: int,
    base: float,
) -> Float[np.ndarray, "*b h n n"]:
    """The score of every span (start i, end j) for every type h, with a query and a key of its own per type.

    [q^0 | k^0 | q^1 | k^1 | ...] = x kernel + bias, each part of width s
    scores[h, i, j] = <R_i q_i^h, R_j k_j^h> / sqrt(s) where i <= j, mask_i and mask_j; -inf elsewhere

    C1. Rows must be starts (queries), columns ends (keys).
    C2. The dense output must be split head by head, and inside a head into query, then key.
    C3. The rotation must be interleaved, on both sides, with frequencies of width s.
    C4. Scores must be divided by sqrt(s); adding one number to all positions must change nothing.
    C5. Entries below the diagonal and in rows or columns of masked tokens must be -inf exactly.
    Raises: ShapeError unless kernel is (d, 2 h s), bias (2 h s,), mask (..., n), positions (n,) or (..., n);
    DomainError for heads < 1, an odd or zero s, a mask that is not boolean, positions that are not integers.
    Precision: float64 throughout; the budget is measured against abs(q) abs(k)^T / sqrt(s) of the rotated vectors.
    Source: kexue.fm/archives/8373; rotary base 10000 there.
    Differs: bert4keras and most ports subtract 1e12 where -inf stands here (about -1.25e11 after the division by
    sqrt(64)), or multiply the padding away and leave lower-triangle scores finite; ports that repeat the cosines
    blockwise while pairing neighbours rotate wrongly; span reading (cmrc2018) uses one head and no bias (zeros here).
    """
    operation = "head.global_pointer"
    check.domain(operation, heads >= 1, "heads >= 1", heads=heads)
    z, allowed, positions = _tokens(operation, x, kernel, bias, mask, positions)
    check.domain(
        operation,
        z.shape[-1] > 0 and z.shape[-1] % (4 * heads) == 0,
        "kernel width 2 h s with an even head size s >= 2",
        width=z.shape[-1],
        heads=heads,
    )
    s = z.shape[-1] // (2 * heads)
    z = z.reshape(*z.shape[:-1], heads, 2, s)
    angles = rope.angles(positions, rope.frequencies(s, base=base))[..., None, :]
    q = rope.rotate_interleaved(z[..., 0, :], angles)
    k = rope.rotate_interleaved(z[..., 1, :], angles)
    scores = np.einsum("...nhs,...mhs->...hnm", q, k) / np.sqrt(s)
    return np.where(allowed[..., None, :, :], scores, -np.inf)


def efficient_global_pointer(
    x: Shaped[np.ndarray, "*b n d"],
    kernel: Shaped[np.ndarray, "_d _f"],
    bias: Shaped[np.ndarray, " _f"],
    type_kernel: Shaped[np.ndarray, "_f _t"],
    type_bias: Shaped[np.ndarray, " _t"],
    mask: Shaped[np.ndarray, "..."],
    positions: Shaped[np.ndarray, "..."],
    *,
    base: float,
) -> Float[np.ndarray, "*b h n n"]:
    """The score of every span for every type, from one shared query-key pair plus a start and an end term per type.

    z = x kernel + bias,  q = z[0::2],  k = z[1::2],  t = z type_kernel + type_bias
    scores[h, i, j] = <R_i q_i, R_j k_j> / sqrt(s) + t_j[2 h] / 2 + t_i[2 h + 1] / 2 where i <= j, mask_i and mask_j;
    -inf elsewhere

    C1. Even channels of z must be the query, odd channels the key.
    C2. Even channels of t must be added at the end token, odd channels at the start token, both halved.
    C3. t must be formed from z before the rotation.
    C4. Masking, scaling and rotation must be those of global_pointer.
    Raises: ShapeError unless kernel is (d, 2 s), type_kernel (2 s, 2 h), biases (2 s,) and (2 h,), mask (..., n),
    positions (n,) or (..., n); DomainError for an odd or zero s or h = 0, and as global_pointer.
    Precision: as global_pointer, plus (abs(z) abs(type_kernel) + abs(type_bias)) / 2 of both tokens.
    Source: kexue.fm/archives/8877, in bert4keras' layout.
    Differs: several PyTorch ports split z into halves instead of even and odd channels, some form t from x; the
    article's formula halves nothing, bert4keras does.
    """
    operation = "head.efficient_global_pointer"
    z, allowed, positions = _tokens(operation, x, kernel, bias, mask, positions)
    check.domain(operation, z.shape[-1] > 0 and z.shape[-1] % 4 == 0, "an even head size s >= 2", width=z.shape[-1])
    t = _dense(operation, z, type_kernel, type_bias)
    check.domain(operation, t.shape[-1] > 0 and t.shape[-1] % 2 == 0, "type_kernel width 2 h", width=t.shape[-1])
    s = z.shape[-1] // 2
    angles = rope.angles(positions, rope.frequencies(s, base=base))
    q = rope.rotate_interleaved(z[..., 0::2], angles)
    k = rope.rotate_interleaved(z[..., 1::2], angles)
    scores = np.einsum("...ns,...ms->...nm", q, k) / np.sqrt(s)
    t = 0.5 * t.swapaxes(-1, -2)
    scores = scores[..., None, :, :] + t[..., 0::2, None, :] + t[..., 1::2, :, None]
    return np.where(allowed[..., None, :, :], scores, -np.inf)


def decode_spans(scores: Shaped[np.ndarray, "_h _n _n"], *, threshold: float) -> Int[np.ndarray, "k 3"]:
    """Every span of one text that scores above the threshold, as rows (type, start, end), end inclusive.

    {(h, i, j): scores[h, i, j] > threshold, i <= j}

    C1. The comparison must be strict.
    C2. Spans that end before they start must never be returned, whatever they score.
    C3. Rows must be sorted by type, then start, then end; overlapping and nested spans are all kept.
    Raises: ShapeError unless scores are (h, n, n); DomainError for NaN or +inf in scores (-inf is allowed) and for a
    threshold that is not finite.
    Precision: exact.
    Source: kexue.fm/archives/8373 (threshold 0, where its loss puts the border).
    Differs: nobody at threshold 0 except for the order.
    """
    scores = _spans("head.decode_spans", scores)
    check.shape("head.decode_spans", scores.ndim == 3, "scores of shape (h, n, n)", scores=scores)
    check.domain("head.decode_spans", bool(np.isfinite(threshold)), "a finite threshold", threshold=threshold)
    return np.argwhere((scores > threshold) & _upper(scores.shape[-1]))


def best_span(scores: Shaped[np.ndarray, "*_b _n _n"], *, max_length: int) -> Span:
    """The highest-scoring span of at most max_length tokens, for each score matrix.

    (start, end) = argmax of scores[i, j] over 0 <= j - i < max_length

    C1. The length must count both ends: max_length = 1 allows single tokens only.
    C2. Among equal scores the smallest start must win, then the smallest end.
    C3. With no finite score in reach (n = 0 included) the span must be (-1, -1) with score -inf.
    Raises: ShapeError unless scores are (..., n, n); DomainError for max_length < 1, NaN or +inf (-inf is allowed).
    Precision: exact; the score is the input's value.
    Source: kexue.fm/archives/8739 (cmrc2018; windows are compared by score).
    Differs: the official cmrc2018 baseline allows 50 tokens; CLUE-bert4keras allows any length and forbids row and
    column 0 ([CLS]), which the caller sets to -inf here.
    """
    scores = _spans("head.best_span", scores)
    check.domain("head.best_span", max_length >= 1, "max_length >= 1", max_length=max_length)
    n = scores.shape[-1]
    reach = _upper(n) & ~np.triu(np.ones((n, n), bool), k=min(max_length, n))
    flat = np.where(reach, scores, -np.inf).reshape(*scores.shape[:-2], n * n)
    best = flat.max(axis=-1, initial=-np.inf)
    # argmax refuses an empty axis; its first maximum in row-major order is the smallest start, then the smallest end.
    index = np.argmax(flat, axis=-1) if n else np.zeros(best.shape, np.int64)
    found = best > -np.inf
    return Span(np.where(found, index // max(n, 1), -1), np.where(found, index % max(n, 1), -1), best)


def _dense(operation: str, x: Any, kernel: Any, bias: Any) -> np.ndarray:
    x = check.real(operation, "x", x)
    kernel = check.real(operation, "kernel", kernel)
    bias = check.real(operation, "bias", bias)
    fits = x.ndim >= 1 and kernel.ndim == 2 and kernel.shape[:1] == x.shape[-1:] and bias.shape == kernel.shape[1:]
    check.shape(operation, fits, "x (..., d), kernel (d, k) and bias (k,)", x=x, kernel=kernel, bias=bias)
    return x @ kernel + bias


def _tokens(
    operation: str, x: Any, kernel: Any, bias: Any, mask: Any, positions: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # The dense output, which (start, end) pairs are allowed, and the positions.
    mask = check.boolean(operation, "mask", mask)
    positions = check.integer(operation, "positions", positions)
    z = _dense(operation, x, kernel, bias)
    fits = z.ndim >= 2 and mask.shape == z.shape[:-1] and positions.shape in (mask.shape, mask.shape[-1:])
    expected = "x (..., n, d), mask (..., n) and positions (n,) or (..., n)"
    check.shape(operation, fits, expected, x=np.asarray(x), mask=mask, positions=positions)
    return z, mask[..., :, None] & mask[..., None, :] & _upper(mask.shape[-1]), positions


def _spans(operation: str, scores: Any) -> np.ndarray:
    scores = check.real(operation, "scores", scores, finite=False)
    check.shape(operation, scores.ndim >= 2 and scores.shape[-1] == scores.shape[-2], "(..., n, n)", scores=scores)
    largest = scores.max(initial=-np.inf)
    # The maximum is NaN as soon as one score is.
    check.domain(operation, bool(largest < np.inf), "scores without NaN and below +inf", largest=float(largest))
    return scores


def _upper(n: int) -> np.ndarray:
    return np.triu(np.ones((n, n), bool))
