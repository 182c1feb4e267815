"""From token vectors to decisions: classes, choices, and scores of every span (start, end).

global_pointer: scores[h, i, j] = <R_i q_i^h, R_j k_j^h> / sqrt(s) for i <= j with both tokens unmasked, -inf elsewhere

Specification: refimpl/ops/head.py. Scores are hidden by adding 0 or -inf, one array (..., n, n) for all types.
"""

import math
from typing import NamedTuple

import numpy as np

from export import check
from export.graph import Value, agree, arange, constant, function, maximum, op, pad, where
from export.ops import rope
from export.special import scaled


class Span(NamedTuple):
    """The best span of each score matrix: first and last token, both inclusive, and its score."""

    start: Value
    end: Value
    score: Value


@function
def classify(x: Value, kernel: Value, bias: Value) -> Value:
    """The logits of k classes from one pooled vector."""
    return _dense("head.classify", x, kernel, bias)


@function
def choose(x: Value, kernel: Value, bias: Value, mask: Value) -> Value:
    """One score per choice of a multiple-choice question; a masked choice scores -inf."""
    check.boolean("head.choose", "mask", mask)
    scores = _dense("head.choose", x, kernel, bias)
    fits = int(kernel.shape[1]) == 1 and mask.ndim >= 1 and check.same(mask.shape, scores.shape[:-1])
    expected = "x (..., k, d), kernel (d, 1), bias (1,) and mask (..., k)"
    check.shape("head.choose", fits, expected, x=x, kernel=kernel, mask=mask)
    return where(mask, scores[..., 0], -np.inf)


@function
def global_pointer(
    x: Value, kernel: Value, bias: Value, mask: Value, positions: Value, *, heads: int, base: float
) -> Value:
    """The score of every span (start i, end j) for every type h, with a query and a key of its own per type."""
    operation = "head.global_pointer"
    check.domain(operation, heads >= 1, "heads >= 1", heads=heads)
    z, hidden, positions = _tokens(operation, x, kernel, bias, mask, positions)
    width = int(kernel.shape[1])
    whole = width > 0 and width % (4 * heads) == 0
    check.domain(operation, whole, "kernel width 2 h s with an even head size s >= 2", width=width, heads=heads)
    s = width // (2 * heads)
    angles = rope.angles(positions, rope.frequencies(s, base=base))[..., None, :]
    # Queries and keys turn by the same angles, as so many heads.
    turned = rope.rotate_interleaved(z.regroup(1, 2 * heads, s), angles).regroup(2, heads, 2, s)
    q, k = turned[..., 0, :], turned[..., 1, :]
    axes = range(q.ndim)
    scores = scaled(q.swap(-3, -2), 1 / math.sqrt(s)) @ k.transpose(*axes[:-3], -2, -1, -3)
    return scores + hidden[..., None, :, :]


@function
def efficient_global_pointer(
    x: Value,
    kernel: Value,
    bias: Value,
    type_kernel: Value,
    type_bias: Value,
    mask: Value,
    positions: Value,
    *,
    base: float,
) -> Value:
    """The score of every span for every type, from one shared query-key pair plus a start and an end term per type."""
    operation = "head.efficient_global_pointer"
    z, hidden, positions = _tokens(operation, x, kernel, bias, mask, positions)
    width = int(kernel.shape[1])
    check.domain(operation, width > 0 and width % 4 == 0, "an even head size s >= 2", width=width)
    terms = _dense(operation, z, type_kernel, type_bias)
    types = int(type_kernel.shape[1])
    check.domain(operation, types > 0 and types % 2 == 0, "type_kernel width 2 h", width=types)
    s = width // 2
    angles = rope.angles(positions, rope.frequencies(s, base=base))
    q, k = rope.rotate_interleaved(z[..., 0::2], angles), rope.rotate_interleaved(z[..., 1::2], angles)
    shared = scaled(q, 1 / math.sqrt(s)) @ k.swap(-2, -1) + hidden
    terms = (terms * 0.5).swap(-2, -1)
    return shared[..., None, :, :] + terms[..., 0::2, None, :] + terms[..., 1::2, :, None]


@function
def decode_spans(scores: Value, *, threshold: float) -> Value:
    """Every span of one text that scores above the threshold, as rows (type, start, end), end inclusive."""
    operation = "head.decode_spans"
    check.real(operation, "scores", scores)
    fits = scores.ndim == 3 and agree(*scores.shape[-2:])
    check.shape(operation, fits, "scores of shape (h, n, n)", scores=scores)
    check.domain(operation, math.isfinite(threshold), "a finite threshold", threshold=threshold)
    above = scores > constant(_rounded_down(threshold, scores.dtype))
    # NonZero counts in row-major order: by type, start and end.
    found = op("NonZero", above & _upper(scores.size(-1)), dtype=np.int64, shape=(3, None))
    return found.transpose(1, 0)


@function
def best_span(scores: Value, *, max_length: int) -> Span:
    """The highest-scoring span of at most max_length tokens, for each score matrix; (-1, -1) where there is none."""
    operation = "head.best_span"
    check.real(operation, "scores", scores)
    check.shape(operation, scores.ndim >= 2 and agree(*scores.shape[-2:]), "(..., n, n)", scores=scores)
    check.domain(operation, max_length >= 1, "max_length >= 1", max_length=max_length)
    n = scores.size(-1)
    lead = [scores.size(axis) for axis in range(scores.ndim - 2)]
    start, end = arange(n)[:, None], arange(n)
    reach = (start <= end) & (end < start + max_length)
    flat = where(reach, scores, -np.inf).reshape(*lead, n * n)
    # A first entry of -inf is the best one where nothing else is: in an empty matrix too.
    flat = pad(flat, [0] * len(lead) + [1], [0] * (len(lead) + 1), -np.inf)
    index = op("ArgMax", flat, axis=-1, keepdims=0, dtype=np.int64, shape=flat.shape[:-1]) - 1
    found, width = index >= 0, maximum(n, 1)
    return Span(where(found, index / width, -1), where(found, index % width, -1), flat.max(-1))


def _dense(operation: str, x: Value, kernel: Value, bias: Value) -> Value:
    for name, values in (("x", x), ("kernel", kernel), ("bias", bias)):
        check.real(operation, name, values)
    fits = x.ndim >= 1 and kernel.ndim == 2 and bias.ndim == 1
    fits = fits and int(kernel.shape[0]) == int(x.shape[-1]) and int(bias.shape[0]) == int(kernel.shape[1])
    check.shape(operation, fits, "x (..., d), kernel (d, k) and bias (k,)", x=x, kernel=kernel, bias=bias)
    return x @ kernel + bias


def _tokens(
    operation: str, x: Value, kernel: Value, bias: Value, mask: Value, positions: Value
) -> tuple[Value, Value, Value]:
    """The dense output, what is added to the scores of (start, end), and the positions."""
    check.boolean(operation, "mask", mask)
    positions = check.integer(operation, "positions", positions)
    z = _dense(operation, x, kernel, bias)
    fits = z.ndim >= 2 and check.same(mask.shape, z.shape[:-1])
    fits = fits and (check.same(positions.shape, mask.shape) or check.same(positions.shape, mask.shape[-1:]))
    expected = "x (..., n, d), mask (..., n) and positions (n,) or (..., n)"
    check.shape(operation, fits, expected, x=x, mask=mask, positions=positions)
    allowed = mask[..., :, None] & mask[..., None, :] & _upper(mask.size(-1))
    return z, where(allowed, constant(0, z.dtype), -np.inf), positions


def _upper(n: Value) -> Value:
    return arange(n)[:, None] <= arange(n)


def _rounded_down(number: float, dtype: np.dtype) -> np.ndarray:
    """The largest value of the format that is at most `number`: what lies above one lies above the other."""
    with np.errstate(over="ignore"):
        rounded = np.asarray(number, dtype)
    return rounded if float(rounded) <= number else np.nextafter(rounded, np.asarray(-np.inf, dtype))
