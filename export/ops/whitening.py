"""Whitening of embeddings as graphs: the moments, the map they give, and its use; also the fit itself.

    Sigma = (1/N) sum (x - beta mu)^T (x - beta mu) = U Lambda U^T;   y = (x - beta mu) U Lambda^(-gamma/2) [:, :k]

ONNX has no eigensolver: the spectrum is found by Jacobi rotations in a Loop, in float64 whatever the input, for a width
that is fixed in the graph. Values are not checked: k beyond the rank gives columns without meaning, not an error.
Specification: refimpl/ops/whitening.py.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple

import numpy as np

from export import check
from export.graph import (
    Value,
    agree,
    arange,
    concat,
    constant,
    function,
    loop,
    maximum,
    minimum,
    op,
    pad,
    scan,
    sqrt,
    stack,
    take,
    where,
)

# Floor of the norm a row is divided by, from the authors' code.
NORM_FLOOR = 1e-8
# Six to ten sweeps are needed up to d = 256, twenty and more where the eigenvalues span fourteen decades.
MOST_SWEEPS = 60


@dataclass(frozen=True)
class Moments:
    """Number of rows (a number or an int64 scalar), their mean (d,), and their scatter (d, d)."""

    count: int | Value
    mean: Value
    scatter: Value


class Spectrum(NamedTuple):
    """Eigenvalues in descending order and the matching eigenvectors as columns."""

    values: Value
    vectors: Value


class Trial(NamedTuple):
    """One point of a grid and its score; of the best one all four are values of the graph."""

    beta: float | Value
    gamma: float | Value
    k: int | Value
    score: Value


class Search(NamedTuple):
    """The best trial, and all of them in the order of the grid."""

    best: Trial
    trials: tuple[Trial, ...]


@function
def moments(x: Value) -> Moments:
    """Count, mean and scatter of x (n, d), in two passes. Raises: ShapeError unless x has two axes."""
    name = "whitening.moments"
    check.shape(name, check.real(name, "x", x).ndim == 2, "x (n, d)", x=x)
    n = maximum(x.size(0), 1).cast(x.dtype)
    mean = x.sum(0) / n
    residual = (x - mean).sum(0) / n
    centred = x - mean - residual
    return Moments(x.size(0), mean + residual, centred.swap(0, 1) @ centred)


@function
def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the rows of a and b together, by Chan's update; no rows are neutral.

    Raises: ShapeError for different widths.
    """
    _fits("whitening.merge", a=a, b=b)
    dtype = a.mean.dtype
    n = a.count + b.count
    whole = maximum(n, 1).cast(np.float64) if isinstance(n, Value) else float(max(n, 1))
    # Counts are divided in float64: float32 holds no integers beyond 2^24.
    share = _number(b.count) / whole
    cross = _as(_number(a.count) * share, dtype)
    share, delta = _as(share, dtype), b.mean - a.mean
    return Moments(n, a.mean + delta * share, a.scatter + b.scatter + _outer(delta) * cross)


@function
def moments_streamed(blocks: Iterable[Value]) -> Moments:
    """`moments` of all rows of some (n, d) blocks, each of any number of rows, merged one after the other.

    Raises: ShapeError for blocks of different widths or none at all.
    """
    parts = [moments(block) for block in blocks]
    check.shape("whitening.moments_streamed", len(parts) > 0, "at least one block", blocks=len(parts))
    return reduce(merge, parts)


@function
def covariance(m: Moments, *, beta: float) -> Value:
    """Second moment around beta times the mean: scatter / n + (1 - beta)^2 mean^T mean.

    Raises: DomainError without rows, where the count is a number, or for a beta that is not finite.
    """
    name = "whitening.covariance"
    _fits(name, m=m)
    check.domain(name, isinstance(m.count, Value) or m.count >= 1, "at least one row", count=m.count)
    check.domain(name, math.isfinite(beta), "a finite beta", beta=beta)
    # The signs keep the division away from the product that made the scatter: ONNX Runtime would fold it in as float32.
    centred = -(-m.scatter / _as(_number(m.count), m.scatter.dtype))
    return centred if beta == 1 else centred + _outer(m.mean) * (1 - beta) ** 2


@function
def spectrum(sigma: Value) -> Spectrum:
    """Eigenvalues of a symmetric matrix in descending order, with eigenvectors of a fixed sign.

    The largest entry by magnitude of a column (the first of equals) is positive. Raises: ShapeError unless square.
    """
    values, vectors = _eigen("whitening.spectrum", sigma)
    return Spectrum(values.cast(sigma.dtype), vectors.cast(sigma.dtype))


@function
def rank(values: Value) -> Value:
    """Number of values (d,) above max(values) d 2^-52, an int64 scalar. Raises: ShapeError unless of one axis."""
    name = "whitening.rank"
    check.shape(name, check.real(name, "values", values).ndim == 1, "values (d,)", values=values)
    return _above(values.cast(np.float64)).cast(np.int64).sum(0)


@function
def projection(sigma: Value, *, gamma: float, k: int) -> Value:
    """W = U[:, :k] diag(values[:k]^(-gamma / 2)). With gamma > 0, k must not exceed the rank; that is not checked.

    Raises: ShapeError unless sigma is square; DomainError for k outside 1..d or a negative gamma.
    """
    _possible("whitening.projection", sigma, gamma, k)
    values, vectors = _eigen("whitening.projection", sigma)
    return _scaled(values, vectors, gamma, k).cast(sigma.dtype)


@function
def projection_null_zero(sigma: Value, *, gamma: float, k: int) -> Value:
    """`projection` with zero columns for components without variance, where gamma > 0. Raises: as projection."""
    _possible("whitening.projection_null_zero", sigma, gamma, k)
    values, vectors = _eigen("whitening.projection_null_zero", sigma)
    if gamma > 0:
        kept = _above(values)
        values, vectors = where(kept, values, 1), where(kept, vectors, 0)
    return _scaled(values, vectors, gamma, k).cast(sigma.dtype)


@function
def transform(x: Value, mean: Value, w: Value, *, beta: float) -> Value:
    """(x - beta mean) W as x W + bias with bias = -beta mean W, for two axes one Gemm.

    Raises: ShapeError unless (..., d), (d,), (d, k); DomainError for a beta that is not finite.
    """
    name = "whitening.transform"
    for label, value in (("x", x), ("mean", mean), ("w", w)):
        check.real(name, label, value)
    fits = x.ndim >= 1 and mean.ndim == 1 and w.ndim == 2 and agree(x.shape[-1], mean.shape[0], w.shape[0])
    check.shape(name, fits, "x (..., d), mean (d,), w (d, k)", x=x, mean=mean, w=w)
    check.domain(name, math.isfinite(beta), "a finite beta", beta=beta)
    bias = (mean * -beta)[None] @ w
    if x.ndim == 2:
        return op("Gemm", x, w, bias, shape=(x.shape[0], w.shape[1]))
    return (x[None] @ w + bias)[0] if x.ndim == 1 else x @ w + bias


@function
def normalize(x: Value) -> Value:
    """x / max(|x|, NORM_FLOOR) for rows x (..., d). Raises: ShapeError for a number."""
    name = "whitening.normalize"
    check.shape(name, check.real(name, "x", x).ndim >= 1, "x (..., d)", x=x)
    return x / maximum(sqrt((x * x).sum(-1, keepdims=True)), NORM_FLOOR)


@function
def whiten(sample: Value, x: Value, *, beta: float, gamma: float, k: int) -> Value:
    """Normalised rows of x under the whitening fitted on `sample`: fit, transform, normalise. Raises: as its parts."""
    m = moments(sample)
    return normalize(transform(x, m.mean, projection(covariance(m, beta=beta), gamma=gamma, k=k), beta=beta))


@function
def spearman(a: Value, b: Value) -> Value:
    """Pearson's correlation of average ranks along the last axis, NaN for a constant.

    A rank is counted: n^2 comparisons for n values. Raises: ShapeError unless two values of one shape, n >= 2.
    """
    name = "whitening.spearman"
    a, b = check.real(name, "a", a), check.real(name, "b", b)
    fits = a.ndim == b.ndim >= 1 and all(map(agree, a.shape, b.shape))
    fits = fits and (a.shape[-1] is None or not any(agree(a.shape[-1], few) for few in (0, 1)))
    check.shape(name, fits, "a (..., n), b (..., n), n >= 2", a=a, b=b)
    left, right = _ranks(a), _ranks(b)
    return (left * right).sum(-1) / sqrt((left * left).sum(-1) * (right * right).sum(-1))


@function
def search(
    m: Moments,
    score: Callable[[Callable[[Value], Value]], Value],
    *,
    betas: Sequence[float],
    gammas: Sequence[float],
    ks: Sequence[int],
) -> Search:
    """The (beta, gamma, k) of a grid with the highest score; score(encode) is called once for every point.

    The first of equal scores wins, and NaN never, unless there is nothing else.
    Raises: DomainError for an empty grid, or a point that `projection` refuses.
    """
    name = "whitening.search"
    grid = [(beta, gamma, k) for beta in betas for gamma in gammas for k in ks]
    check.domain(name, bool(grid), "a grid with a point", points=len(grid))
    trials = []
    for beta in betas:
        sigma = covariance(m, beta=beta)
        values, vectors = _eigen(name, sigma)
        for gamma in gammas:
            for k in ks:
                _possible(name, sigma, gamma, k)
            full = _scaled(values, vectors, gamma, max(ks)).cast(sigma.dtype)
            for k in ks:
                encode = partial(_encode, mean=m.mean, w=full[:, :k], beta=beta)
                trials.append(Trial(beta, gamma, k, score(encode)))
    scores = stack([t.score for t in trials], axis=0)
    number = where(scores == scores, scores, -math.inf)
    first = op("ArgMax", number, axis=0, keepdims=0, dtype=np.int64, shape=())
    columns = zip(zip(*grid, strict=True), (np.float64, np.float64, np.int64), strict=True)
    points = [constant(column, dtype) for column, dtype in columns]
    return Search(Trial(*(take(p, first, axis=0) for p in (*points, scores))), tuple(trials))


def _encode(x: Value, *, mean: Value, w: Value, beta: float) -> Value:
    return normalize(transform(x, mean, w, beta=beta))


def _eigen(name: str, sigma: Value) -> tuple[Value, Value]:
    """Descending eigenvalues and their vectors in float64, by cyclic Jacobi rotations.

    A round turns d/2 disjoint pairs (i, i + d/2) at once and then moves every index one seat on, as in a round-robin
    tournament, so that after a sweep of d - 1 rounds every pair has met and every index is back in its place.
    """
    square = check.real(name, "sigma", sigma).ndim == 2 and agree(*sigma.shape)
    check.shape(name, square, "sigma (d, d)", sigma=sigma)
    d, _ = map(int, sigma.shape)
    half = (d + 1) // 2
    width = 2 * half
    seats = np.array([0, 1] if half == 1 else [0, half, *range(1, half - 1), *range(half + 1, width), half - 1])
    new, partner = np.argsort(seats), (seats + half) % width
    sign = np.where(seats < half, -1.0, 1.0)[:, None]
    first, second = np.arange(half), np.arange(half, width)
    changed = np.concatenate([new[first] * width + new[second], new[second] * width + new[first], new * (width + 1)])
    # What is left beside the diagonal turns no vector and moves no value by more than rounding does.
    floor = math.sqrt(d) * 2.0**-55

    def rotated(x: Value, cosine: Value, sine: Value) -> Value:
        """The rows of x, turned in pairs and moved to their new seats."""
        return take(x, seats, axis=0) * cosine + take(x, partner, axis=0) * sine

    def met(states: Sequence[Value], limit: Value) -> list[Value]:
        """One round."""
        a, rows = states
        flat = a.reshape(width * width)
        on = take(flat, np.arange(width) * (width + 1), axis=0)
        off = take(flat, first * width + second, axis=0)
        left, right = on[:half], on[half:]
        still = abs(off) <= limit
        # tan of the smaller angle that makes `off` zero.
        slope = (right - left) / where(off == 0, 1, off * 2)
        tangent = where(slope < 0, constant(-1.0), 1) / (abs(slope) + sqrt(slope * slope + 1))
        tangent = where(still, 0, tangent)
        c = 1 / sqrt(tangent * tangent + 1)
        cosine, sine = (take(concat([v, v], axis=0), seats, axis=0)[:, None] for v in (c, tangent * c))
        sine = sine * sign
        # J^T A J is symmetric: rows turned, transposed, rows turned again.
        turned = rotated(rotated(a, cosine, sine).swap(0, 1), cosine, sine).reshape(width * width)
        kept, step = where(still, off, 0), tangent * off
        entries = concat([kept, kept, left - step, right + step], axis=0)
        turned = op("ScatterElements", turned, constant(changed), entries)
        return [turned.reshape(width, width), rotated(rows, cosine, sine)]

    def sweep(states: Sequence[Value]) -> tuple[Value, Sequence[Value]]:
        size, off = abs(states[0]).max([0, 1]), abs(states[0] * beside).max([0, 1])
        # Small entries wait: between equal values their angles are large, and would mix what is not yet zero.
        square = off * (off / where(size == 0, 1, size))
        limit = maximum(minimum(off * 1e-3, square * d), size * floor)
        a, rows = scan(lambda held, _: (met(held, limit), []), states, [arange(width - 1)])[0]
        return abs(a * beside).max([0, 1]) > size * floor, (a, rows)

    # Written as a comparison, so that no matrix is stored in the model.
    eye = (arange(width)[:, None] == arange(width)).cast(np.float64)
    beside = 1 - eye
    a = sigma.cast(np.float64)
    a = a * 0.5 + a.swap(0, 1) * 0.5
    if width > d:
        a = pad(a, [0, 0], [1, 1])
    a, rows = loop(sweep, [a, eye], most=MOST_SWEEPS)
    values, rows = (a * eye).sum(0)[:d], rows[:d, :d]
    # The product of thousands of rotations, orthogonal again to rounding.
    rows = rows * 1.5 - (rows @ rows.swap(0, 1)) @ rows * 0.5
    count = constant([d], np.int64)
    values, order = op("TopK", values, count, outputs=2, dtype=[np.float64, np.int64], shape=[(d,), (d,)])
    rows = take(rows, order, axis=0)
    peak = op("ArgMax", abs(rows), axis=1, keepdims=1, dtype=np.int64, shape=(d, 1))
    top = op("GatherElements", rows, peak, axis=1, shape=(d, 1))
    return values, (rows * where(top < 0, constant(-1.0), 1)).swap(0, 1)


def _possible(name: str, sigma: Value, gamma: float, k: int) -> None:
    check.domain(name, 0 <= gamma < math.inf, "gamma >= 0", gamma=gamma)
    check.shape(name, check.real(name, "sigma", sigma).ndim == 2, "sigma (d, d)", sigma=sigma)
    whole = isinstance(k, (int, np.integer)) and not isinstance(k, bool)
    check.domain(name, whole and 1 <= k <= int(sigma.shape[0]), f"k in 1..{int(sigma.shape[0])}", k=k)


def _scaled(values: Value, vectors: Value, gamma: float, k: int) -> Value:
    # Null eigenvalues may come out negative: without a power to take they are never touched.
    vectors = vectors[:, :k]
    return vectors * values[:k] ** (-gamma / 2) if gamma > 0 else vectors


def _above(values: Value) -> Value:
    return values > maximum(values.max(0), 0) * (int(values.shape[0]) * 2.0**-52)


def _ranks(v: Value) -> Value:
    """Twice the average ranks, centred: how many values are smaller, less how many are larger."""
    larger = (v[..., :, None] > v[..., None, :]).cast(v.dtype)
    return larger.sum(-1) - larger.sum(-2)


def _outer(v: Value) -> Value:
    return v[:, None] * v[None]


def _number(count: int | Value) -> float | Value:
    return count.cast(np.float64) if isinstance(count, Value) else float(count)


def _as(number: float | Value, dtype: np.dtype) -> float | Value:
    return number.cast(dtype) if isinstance(number, Value) else number


def _fits(name: str, **given: Moments) -> None:
    for m in given.values():
        d = check.real(name, "mean", m.mean).shape
        check.real(name, "scatter", m.scatter)
        fits = len(d) == 1 and m.scatter.ndim == 2 and agree(*d, *m.scatter.shape)
        check.shape(name, fits, "mean (d,), scatter (d, d)", mean=m.mean, scatter=m.scatter)
    fits = agree(*(m.mean.shape[0] for m in given.values()))
    check.shape(name, fits, "equal widths d", **{label: m.mean for label, m in given.items()})
