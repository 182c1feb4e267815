"""Whitening of embeddings: a linear map fitted on their mean and covariance, before cosine similarity.

    Sigma = (1/N) sum (x - beta mu)^T (x - beta mu) = U Lambda U^T;   y = (x - beta mu) U Lambda^(-gamma/2) [:, :k]

Specification: refimpl/ops/whitening.py. Everything is formed in float32 at least and rounded once, whole streams and
`whiten` included. A scatter is a sum of squares, which overflows float16 soon: fit on moments(x.float()) there.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from torchimpl import check

NORM_FLOOR = 1e-8
# Rows centred at once while streaming.
BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Moments:
    """Number of rows, their mean, and their scatter sum (x - mean)^T (x - mean): all that whitening needs to know.

    Raises: ShapeError unless mean is (d,) and scatter (d, d); DomainError unless both are floating and count >= 0.
    """

    count: int
    mean: Float[Tensor, "d"]
    scatter: Float[Tensor, "_d _d"]

    def __post_init__(self) -> None:
        op = "whitening.Moments"
        check.real(op, "mean", self.mean)
        check.real(op, "scatter", self.scatter)
        fits = self.mean.ndim == 1 and self.scatter.shape == (*self.mean.shape, *self.mean.shape)
        check.shape(op, fits, "mean (d,), scatter (d, d)", mean=self.mean, scatter=self.scatter)
        check.domain(op, self.count >= 0, "count >= 0", count=self.count)


class Spectrum(NamedTuple):
    """Eigenvalues in descending order and the matching eigenvectors as columns."""

    values: Float[Tensor, "d"]
    vectors: Float[Tensor, "d d"]


class Trial(NamedTuple):
    """One point of a grid and its score."""

    beta: float
    gamma: float
    k: int
    score: float


class Search(NamedTuple):
    """The best trial, and all of them in the order of the grid."""

    best: Trial
    trials: tuple[Trial, ...]


def moments(x: Float[Tensor, "*n d"]) -> Moments:
    """Count, mean and scatter of the rows of x, in two passes.

    Raises: ShapeError unless x is (n, d) with d >= 1; DomainError unless floating.
    """
    check.real("whitening.moments", "x", x)
    check.shape("whitening.moments", x.ndim == 2 and x.shape[1] >= 1, "x (n, d) with d >= 1", x=x)
    return _rounded(_moments(x), x.dtype)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the rows of a and b together.

    Raises: ShapeError for different widths.
    """
    check.shape("whitening.merge", a.mean.shape == b.mean.shape, "equal widths d", a=a.mean, b=b.mean)
    return _rounded(_merged(a, b), a.mean.dtype)


def moments_streamed(blocks: Iterable[Tensor]) -> Moments:
    """`moments` of all rows of an iterator of (n, d) blocks, in one pass and O(d^2) memory.

    Every BLOCK_ROWS rows are merged into what came before; the format is that of the first block.
    Raises: ShapeError for blocks of different widths or none at all; DomainError unless floating.
    """
    op = "whitening.moments_streamed"
    total, dtype = Moments(0, torch.zeros(0), torch.zeros(0, 0)), torch.float32
    for block in blocks:
        check.real(op, "blocks", block)
        check.shape(op, block.ndim == 2 and block.shape[1] >= 1, "blocks (n, d) with d >= 1", block=block)
        same = total.count == 0 or block.shape[1:] == total.mean.shape
        check.shape(op, same, "blocks of one width", block=block, mean=total.mean)
        for rows in block.split(BLOCK_ROWS) if block.shape[0] else ():
            dtype = dtype if total.count else rows.dtype
            total = _merged(total, _moments(rows)) if total.count else _moments(rows)
    check.shape(op, total.count > 0, "at least one row", mean=total.mean)
    return _rounded(total, dtype)


def covariance(m: Moments, *, beta: float) -> Float[Tensor, "d d"]:
    """Second moment of the rows around beta times their mean.

    Raises: DomainError without rows or for a beta that is not finite.
    """
    op = "whitening.covariance"
    check.domain(op, m.count >= 1, "at least one row", count=m.count)
    _check_beta(op, beta)
    mean = check.island(m.mean)
    return (check.island(m.scatter) / m.count + (1 - beta) ** 2 * torch.outer(mean, mean)).to(m.mean.dtype)


def spectrum(sigma: Float[Tensor, "*_ d"]) -> Spectrum:
    """Eigenvalues of a symmetric matrix in descending order, with eigenvectors of a fixed sign.

    Only the lower triangle is read. Gradients of vectors exist where values differ.
    The solver of torch waits for the device.
    Raises: ShapeError unless square.
    """
    values, vectors = _spectrum("whitening.spectrum", sigma)
    return Spectrum(values.to(sigma.dtype), vectors.to(sigma.dtype))


def rank(values: Float[Tensor, "*d"]) -> int:
    """Number of eigenvalues above max(values) d 2^-52, or the epsilon of their format; an int waits for the device.

    Raises: ShapeError unless values are (d,).
    """
    check.real("whitening.rank", "values", values)
    check.shape("whitening.rank", values.ndim == 1, "values (d,)", values=values)
    return int(_above_floor(check.island(values)).sum())


def projection(sigma: Float[Tensor, "*_ d"], *, gamma: float, k: int) -> Float[Tensor, "d k"]:
    """The matrix W that keeps k components and takes out the share gamma of their scale.

    Where gamma > 0, columns without variance, which the specification refuses, are NaN: see `rank`.
    Raises: DomainError for k outside 1..d or a negative gamma.
    """
    values, vectors = _kept_spectrum("whitening.projection", sigma, gamma, k)
    return _scaled(values, vectors, gamma, math.nan)[:, :k].to(sigma.dtype)


def projection_null_zero(sigma: Float[Tensor, "*_ d"], *, gamma: float, k: int) -> Float[Tensor, "d k"]:
    """`projection` as a pseudo-inverse: where gamma > 0, components without variance become zero columns.

    Raises: DomainError for k outside 1..d or a negative gamma.
    """
    values, vectors = _kept_spectrum("whitening.projection_null_zero", sigma, gamma, k)
    return _scaled(values, vectors, gamma, 0.0)[:, :k].to(sigma.dtype)


def transform(
    x: Float[Tensor, "*n d"], mean: Float[Tensor, "*_"], w: Float[Tensor, "*_ k"], *, beta: float
) -> Float[Tensor, "*n k"]:
    """Rows shifted by beta times the mean, then projected; in float32 for 16-bit rows, rounded once.

    Raises: ShapeError unless (..., d), (d,), (d, k); DomainError for a beta that is not finite.
    """
    op = "whitening.transform"
    for name, tensor in (("x", x), ("mean", mean), ("w", w)):
        check.real(op, name, tensor)
    fits = x.ndim >= 1 and mean.ndim == 1 and w.ndim == 2 and x.shape[-1] == mean.shape[0] == w.shape[0]
    check.shape(op, fits, "x (..., d), mean (d,), w (d, k)", x=x, mean=mean, w=w)
    _check_beta(op, beta)
    return ((check.island(x) - beta * check.island(mean)) @ check.island(w)).to(x.dtype)


def normalize(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Rows divided by their Euclidean norm, itself clipped from below at NORM_FLOOR.

    Raises: ShapeError for a scalar; DomainError unless floating.
    """
    check.real("whitening.normalize", "x", x)
    check.shape("whitening.normalize", x.ndim >= 1, "x (..., d)", x=x)
    wide = check.island(x)
    square = (wide * wide).sum(dim=-1, keepdim=True)
    # Two choices: the root must not see a zero, where its slope is infinite.
    zero = square == 0
    norm = square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    return (wide / norm.clamp(min=NORM_FLOOR)).to(x.dtype)


def whiten(
    sample: Float[Tensor, "*_ d"], x: Float[Tensor, "*n _d"], *, beta: float, gamma: float, k: int
) -> Float[Tensor, "*n k"]:
    """Normalised rows of x under the whitening fitted on `sample`: fit, transform, normalise.

    Raises: as its parts.
    """
    check.real("whitening.whiten", "x", x)
    m = moments(check.island(check.real("whitening.whiten", "sample", sample)))
    w = projection(covariance(m, beta=beta), gamma=gamma, k=k)
    return normalize(transform(check.island(x), m.mean, w, beta=beta)).to(x.dtype)


def spearman(a: Float[Tensor, "*b n"], b: Float[Tensor, "*_"]) -> Float[Tensor, "*b"]:
    """Spearman's rank correlation along the last axis, ties sharing the mean of their ranks; NaN for a constant.

    Sums of ranks are exact integers. As a function of ranks it has no gradient.
    Raises: ShapeError unless two tensors of one shape, n >= 2; DomainError unless floating.
    """
    op = "whitening.spearman"
    check.real(op, "a", a)
    check.real(op, "b", b)
    fits = a.ndim >= 1 and a.shape == b.shape and a.shape[-1] >= 2
    check.shape(op, fits, "a (..., n), b (..., n), n >= 2", a=a, b=b)
    left, right = _doubled_ranks(a), _doubled_ranks(b)
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    # n^3 / 3 at most: int64 up to two million ranks.
    shared, own, other = ((p * q).sum(dim=-1).to(wide) for p, q in ((left, right), (left, left), (right, right)))
    # One root of the product: the root of a square is exact, so that equal orders give 1.
    return (shared / (own * other).sqrt()).to(a.dtype)


def search(
    m: Moments,
    score: Callable[[Callable[[Tensor], Tensor]], float],
    *,
    betas: Sequence[float],
    gammas: Sequence[float],
    ks: Sequence[int],
) -> Search:
    """The (beta, gamma, k) of a grid with the highest score, and the score of every point; the first of equal wins.

        score(encode) -> float,   encode(x) = normalize(transform(x, ...))

    A point beyond the rank is scored with columns of NaN, and NaN never wins.
    Raises: DomainError for an empty grid, only NaN scores, or a k or gamma that `projection` refuses.
    """
    op = "whitening.search"
    trials = []
    for beta in betas:
        spectrum_ = _spectrum(op, covariance(m, beta=beta))
        for gamma in gammas:
            for k in ks:
                _check_kept(op, spectrum_.values, gamma, k)
                w = _scaled(*spectrum_, gamma, math.nan)[:, :k]
                encode = partial(_encode, mean=m.mean, w=w, beta=beta)
                trials.append(Trial(beta, gamma, k, float(score(encode))))
    ranked = [t for t in trials if not math.isnan(t.score)]
    check.domain(op, bool(ranked), "a grid with a score that is a number", points=len(trials))
    return Search(max(ranked, key=lambda t: t.score), tuple(trials))


def _moments(x: Tensor) -> Moments:
    """`moments`, still in float32 where x has 16 bits."""
    wide = check.island(x)
    n = max(x.shape[0], 1)
    mean = wide.sum(dim=0) / n
    # What rounding left in the mean is the mean of the centred rows.
    residual = (wide - mean).sum(dim=0) / n
    centred = wide - mean - residual
    return Moments(x.shape[0], mean + residual, centred.T @ centred)


def _merged(a: Moments, b: Moments) -> Moments:
    """`merge`, still in float32 where they have 16 bits."""
    n = a.count + b.count
    share = b.count / max(n, 1)
    mean = check.island(a.mean)
    delta = check.island(b.mean) - mean
    scatter = check.island(a.scatter) + check.island(b.scatter) + a.count * share * torch.outer(delta, delta)
    return Moments(n, mean + delta * share, scatter)


def _rounded(m: Moments, dtype: torch.dtype) -> Moments:
    return Moments(m.count, m.mean.to(dtype), m.scatter.to(dtype))


def _encode(x: Tensor, *, mean: Tensor, w: Tensor, beta: float) -> Tensor:
    return normalize(transform(x, mean, w, beta=beta))


def _spectrum(op: str, sigma: Tensor) -> Spectrum:
    check.real(op, "sigma", sigma)
    check.shape(op, sigma.ndim == 2 and sigma.shape[0] == sigma.shape[1], "sigma (d, d)", sigma=sigma)
    values, vectors = torch.linalg.eigh(check.island(sigma))
    values, vectors = values.flip(0), vectors.flip(1)
    peak = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return Spectrum(values, torch.where(peak < 0, -vectors, vectors))


def _kept_spectrum(op: str, sigma: Tensor, gamma: float, k: int) -> Spectrum:
    check.real(op, "sigma", sigma)
    spectrum_ = _spectrum(op, sigma)
    _check_kept(op, spectrum_.values, gamma, k)
    return spectrum_


def _above_floor(values: Tensor) -> Tensor:
    """Which eigenvalues are more than rounding errors of zero."""
    floor = values.amax().clamp(min=0) * values.shape[0] * torch.finfo(values.dtype).eps
    return values > floor


def _scaled(values: Tensor, vectors: Tensor, gamma: float, null: float) -> Tensor:
    """vectors values^(-gamma / 2), with columns of `null` where there is no power to take."""
    if gamma == 0:
        return vectors
    kept = _above_floor(values)
    return (vectors * values.masked_fill(~kept, 1) ** (-gamma / 2)).masked_fill(~kept, null)


def _doubled_ranks(v: Tensor) -> Tensor:
    """Twice the distance of every average rank from the mean rank: what is smaller minus what is larger."""
    v = check.island(v.detach()).contiguous()
    ordered = v.sort(dim=-1).values
    smaller = torch.searchsorted(ordered, v)
    return smaller + torch.searchsorted(ordered, v, right=True) - v.shape[-1]


def _check_beta(op: str, beta: float) -> None:
    check.domain(op, -math.inf < beta < math.inf, "a finite beta", beta=beta)


def _check_kept(op: str, values: Tensor, gamma: float, k: int) -> None:
    check.domain(op, 0 <= gamma < math.inf, "gamma >= 0", gamma=gamma)
    d = values.shape[0]
    check.domain(op, isinstance(k, int) and 1 <= k <= d, f"k in 1..{d}", k=k)
