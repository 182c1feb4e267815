"""From token vectors to decisions: classes, choices, and scores of every span (start, end).

global_pointer: scores[h, i, j] = <R_i q_i^h, R_j k_j^h> / sqrt(s) for i <= j with both tokens unmasked, -inf elsewhere

Specification: refimpl/ops/head.py. Dense layers stay in the format of their input; scores of spans are formed in
float32 for 16-bit input and rounded once.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from torchimpl import check
from torchimpl.ops import rope


class Span(NamedTuple):
    """The best span of each score matrix: first and last token, both inclusive, and its score."""

    start: Tensor
    end: Tensor
    score: Tensor


def classify(
    x: Float[Tensor, "*b d"], kernel: Float[Tensor, "_d k"], bias: Float[Tensor, " _k"]
) -> Float[Tensor, "*b k"]:
    """The logits of k classes from one pooled vector; kernel is (in, out), the transpose of torch's Linear.weight.

    Raises: ShapeError unless x is (..., d), kernel (d, k) and bias (k,); DomainError unless all are floating.
    """
    return _dense("head.classify", x, kernel, bias)


def choose(
    x: Float[Tensor, "*b k d"], kernel: Float[Tensor, "_d 1"], bias: Float[Tensor, "1"], mask: Bool[Tensor, "..."]
) -> Float[Tensor, "*b k"]:
    """One score per choice of a multiple-choice question; a masked choice scores -inf.

    Raises: ShapeError unless x is (..., k, d), kernel (d, 1), bias (1,), mask (..., k); DomainError for a mask that is
        not boolean.
    """
    check.boolean("head.choose", "mask", mask)
    scores = _dense("head.choose", x, kernel, bias)
    fits = scores.shape[-1] == 1 and mask.ndim >= 1 and mask.shape == scores.shape[:-1]
    expected = "x (..., k, d), kernel (d, 1), bias (1,) and mask (..., k)"
    check.shape("head.choose", fits, expected, x=x, kernel=kernel, mask=mask)
    return scores[..., 0].masked_fill(~mask, -math.inf)


def global_pointer(
    x: Float[Tensor, "*b n d"],
    kernel: Float[Tensor, "_d _f"],
    bias: Float[Tensor, " _f"],
    mask: Bool[Tensor, "..."],
    positions: Int[Tensor, "..."],
    *,
    heads: int,
    base: float,
) -> Float[Tensor, "*b h n n"]:
    """The score of every span (start i, end j) for every type h, with a query and a key of its own per type.

    Raises: ShapeError unless kernel is (d, 2 h s), bias (2 h s,), mask (..., n), positions (n,) or (..., n);
        DomainError for heads < 1, an odd or zero s, a mask that is not boolean, positions that are not integers.
    """
    operation = "head.global_pointer"
    check.domain(operation, heads >= 1, "heads >= 1", heads=heads)
    z, allowed = _tokens(operation, x, kernel, bias, mask, positions)
    width = z.shape[-1]
    fits = width > 0 and width % (4 * heads) == 0
    expected = "kernel width 2 h s with an even head size s >= 2"
    check.domain(operation, fits, expected, width=width, heads=heads)
    s = width // (2 * heads)
    # (..., n, h, 2, s) to (..., 2, h, n, s).
    pairs = z.unflatten(-1, (heads, 2, s)).movedim(-2, -4).transpose(-3, -2)
    scores = _products(pairs[..., 0, :, :, :], pairs[..., 1, :, :, :], positions[..., None, :], base)
    return scores.masked_fill(~allowed[..., None, :, :], -math.inf).to(z.dtype)


def efficient_global_pointer(
    x: Float[Tensor, "*b n d"],
    kernel: Float[Tensor, "_d _f"],
    bias: Float[Tensor, " _f"],
    type_kernel: Float[Tensor, "_f _t"],
    type_bias: Float[Tensor, " _t"],
    mask: Bool[Tensor, "..."],
    positions: Int[Tensor, "..."],
    *,
    base: float,
) -> Float[Tensor, "*b h n n"]:
    """The score of every span for every type, from one shared query-key pair plus a start and an end term per type.

    Raises: ShapeError unless kernel is (d, 2 s), type_kernel (2 s, 2 h), biases (2 s,) and (2 h,), mask (..., n),
        positions (n,) or (..., n); DomainError for an odd or zero s or h = 0, and as global_pointer.
    """
    operation = "head.efficient_global_pointer"
    z, allowed = _tokens(operation, x, kernel, bias, mask, positions)
    width = z.shape[-1]
    check.domain(operation, width > 0 and width % 4 == 0, "an even head size s >= 2", width=width)
    terms = check.island(_dense(operation, z, type_kernel, type_bias)) / 2
    types = terms.shape[-1]
    check.domain(operation, types > 0 and types % 2 == 0, "type_kernel width 2 h", width=types)
    shared = _products(z[..., 0::2], z[..., 1::2], positions, base)[..., None, :, :]
    ends, starts = terms[..., 0::2].mT[..., None, :], terms[..., 1::2].mT[..., :, None]
    return (shared + ends + starts).masked_fill(~allowed[..., None, :, :], -math.inf).to(z.dtype)


def decode_spans(scores: Float[Tensor, "_h _n _n"], *, threshold: float) -> Int[Tensor, "k 3"]:
    """Every span of one text that scores above the threshold, as sorted rows (type, start, end), end inclusive.

    The number of rows depends on the scores, so this waits for the device. The comparison is that of float64, or of
    float32 on devices without it.
    Raises: ShapeError unless scores are (h, n, n); DomainError for a threshold that is not finite.
    """
    _check_spans("head.decode_spans", scores)
    check.shape("head.decode_spans", scores.ndim == 3, "scores of shape (h, n, n)", scores=scores)
    check.domain("head.decode_spans", -math.inf < threshold < math.inf, "a finite threshold", threshold=threshold)
    # A threshold rounded to the format of the scores could fall on the other side of one of them.
    wide = scores if scores.device.type == "mps" else scores.double()
    return ((wide > threshold) & (_lengths(scores) >= 0)).nonzero()


def best_span(scores: Float[Tensor, "*_b _n _n"], *, max_length: int) -> Span:
    """The highest-scoring span of at most max_length tokens of each score matrix, the first of equal ones.

    Its score is differentiable with respect to the score of that span.
    Raises: ShapeError unless scores are (..., n, n); DomainError for max_length < 1.
    """
    _check_spans("head.best_span", scores)
    check.domain("head.best_span", max_length >= 1, "max_length >= 1", max_length=max_length)
    n, batch = scores.shape[-1], scores.shape[:-2]
    if n == 0:
        none = torch.full(batch, -1, device=scores.device)
        return Span(none, none.clone(), scores.new_full(batch, -math.inf))
    length = _lengths(scores)
    flat = scores.masked_fill((length < 0) | (length >= max_length), -math.inf).flatten(-2)
    # argmax gives the first of equal entries: the smallest start, then the smallest end.
    index = flat.argmax(dim=-1)
    score = flat.gather(-1, index[..., None])[..., 0]
    nothing = score == -math.inf
    return Span((index // n).masked_fill(nothing, -1), (index % n).masked_fill(nothing, -1), score)


def _dense(operation: str, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    for name, tensor in (("x", x), ("kernel", kernel), ("bias", bias)):
        check.real(operation, name, tensor)
    fits = x.ndim >= 1 and kernel.ndim == 2 and kernel.shape[:1] == x.shape[-1:] and bias.shape == kernel.shape[1:]
    check.shape(operation, fits, "x (..., d), kernel (d, k) and bias (k,)", x=x, kernel=kernel, bias=bias)
    return functional.linear(x, kernel.T, bias)


def _tokens(
    operation: str, x: Tensor, kernel: Tensor, bias: Tensor, mask: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The dense output, and which (start, end) pairs are allowed."""
    check.boolean(operation, "mask", mask)
    check.integer(operation, "positions", positions)
    z = _dense(operation, x, kernel, bias)
    fits = (
        z.ndim >= 2
        and mask.shape == z.shape[:-1]
        and (positions.shape == mask.shape or positions.shape == mask.shape[-1:])
    )
    expected = "x (..., n, d), mask (..., n) and positions (n,) or (..., n)"
    check.shape(operation, fits, expected, x=x, mask=mask, positions=positions)
    pairs = mask[..., :, None] & mask[..., None, :]
    return z, pairs & (_lengths(pairs) >= 0)


def _products(q: Tensor, k: Tensor, positions: Tensor, base: float) -> Tensor:
    """<R_i q_i, R_j k_j> / sqrt(s) of q, k (..., n, s), in float32 where they have 16 bits."""
    s = q.shape[-1]
    angles = rope.angles(positions, rope.frequencies(s, base=base))
    # Divided before the product, whose sums are sqrt(s) times larger than the scores.
    q = check.island(rope.rotate_interleaved(q, angles)) / math.sqrt(s)
    return q @ check.island(rope.rotate_interleaved(k, angles)).mT


def _check_spans(operation: str, scores: Tensor) -> None:
    check.real(operation, "scores", scores)
    check.shape(operation, scores.ndim >= 2 and scores.shape[-1] == scores.shape[-2], "(..., n, n)", scores=scores)


def _lengths(pairs: Tensor) -> Tensor:
    """j - i at every entry (i, j) of a square matrix."""
    index = torch.arange(pairs.shape[-1], device=pairs.device)
    return index - index[:, None]
