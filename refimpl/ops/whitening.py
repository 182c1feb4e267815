"""Whitening of embeddings: a linear map fitted on their mean and covariance, before cosine similarity.

    Sigma = (1/N) sum (x - beta mu)^T (x - beta mu) = U Lambda U^T;   y = (x - beta mu) U Lambda^(-gamma/2) [:, :k]

Source: J. Su, J. Cao, W. Liu, Y. Ou, "Whitening Sentence Representations for Better Semantics and Faster
Retrieval" (arXiv:2103.15316), https://kexue.fm/archives/8069; beta and gamma: https://kexue.fm/archives/9079.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from refimpl import check

# Floor of the norm a row is divided by, from the authors' code.
NORM_FLOOR = 1e-8
# Rows centred at once while streaming: 768 columns of them are 12 MiB, and few calls of a threaded BLAS remain.
BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Moments:
    """Number of rows, their mean, and their scatter sum (x - mean)^T (x - mean): all that whitening needs to know."""

    count: int
    mean: Float[np.ndarray, "d"]
    scatter: Float[np.ndarray, "_d _d"]

    def __post_init__(self) -> None:
        for name in ("mean", "scatter"):
            object.__setattr__(self, name, check.real("whitening.Moments", name, getattr(self, name)))
        d = self.mean.shape
        check.shape(
            "whitening.Moments",
            len(d) == 1 and self.scatter.shape == d + d,
            "mean (d,), scatter (d, d)",
            mean=self.mean,
            scatter=self.scatter,
        )
        check.domain("whitening.Moments", self.count >= 0, "count >= 0", count=self.count)


class Spectrum(NamedTuple):
    """Eigenvalues in descending order and the matching eigenvectors as columns."""

    values: Float[np.ndarray, "d"]
    vectors: Float[np.ndarray, "d d"]


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


def moments(x: Shaped[np.ndarray, "*n d"]) -> Moments:
    """Count, mean and scatter of the rows of x, in two passes.

        mean = (1/n) sum x;   scatter = (x - mean)^T (x - mean)

    C1. The scatter must be formed from centred rows, never as sum x^T x - n mean^T mean.
    C2. No rows must give count 0 and zeros, the neutral element of `merge`; one row a zero scatter.

    Raises: ShapeError unless x is (n, d) with d >= 1; DomainError for NaN or infinity.
    Precision: the residual mean of the centred rows is added back, so the mean is good to one rounding.
    Source: kexue.fm 8069 (divides by N later; numpy.cov in the authors' code divides by N - 1).
    """
    op = "whitening.moments"
    x = check.real(op, "x", x)
    check.shape(op, x.ndim == 2 and x.shape[1] >= 1, "x (n, d) with d >= 1", x=x)
    n = max(len(x), 1)
    mean = x.sum(axis=0) / n
    residual = (x - mean).sum(axis=0) / n
    centred = x - mean - residual
    return Moments(len(x), mean + residual, centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the rows of a and b together.

        n = n_a + n_b;   delta = mean_b - mean_a;   mean = mean_a + delta n_b / n
        scatter = scatter_a + scatter_b + delta^T delta n_a n_b / n

    C1. Must be associative and commutative up to rounding, with `moments` of no rows as neutral element.

    Raises: ShapeError for different widths. Precision: only differences of means enter, so a common offset costs
    nothing; raw moments lose it squared (float32, mean 1e4: relative error 12.8 against 1.5e-5).
    Source: T. Chan, G. Golub, R. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances" (1979). Differs: kexue.fm 8069 streams raw moments.
    """
    check.shape("whitening.merge", a.mean.shape == b.mean.shape, "equal widths d", a=a.mean, b=b.mean)
    n = a.count + b.count
    share = b.count / max(n, 1)
    delta = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(delta, delta) * (a.count * share)
    return Moments(n, a.mean + delta * share, scatter)


def moments_streamed(blocks: Iterable[np.ndarray]) -> Moments:
    """`moments` of all rows of an iterator of (n, d) blocks, in one pass and O(d^2) memory.

        delta = block mean - mean;   rows - mean - (1 - sqrt(n_a / n)) delta   have the scatter that `merge` adds

    C1. Must equal `moments` of the concatenation for every division and every order of the blocks.
    C2. Every row must be read once; nothing larger than (BLOCK_ROWS, d) and (d, d) may be kept.

    Raises: ShapeError for blocks of different widths or none at all; DomainError for NaN or infinity.
    Precision: as `merge`; the scatter is a sum of squares, so it never turns indefinite.
    Source: derived from `merge`: with c = 1 - sqrt(n_a / n), n_b (2 c - c^2) = n_b^2 / n.
    """
    from scipy.linalg.blas import dsyrk

    op = "whitening.moments_streamed"
    count, mean, scatter, buffer = 0, np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0))
    for block in blocks:
        check.shape(op, np.ndim(block) == 2 and np.shape(block)[1] >= 1, "blocks (n, d) with d >= 1", block=block)
        for start in range(0, len(block), BLOCK_ROWS):
            rows = check.real(op, "blocks", block[start : start + BLOCK_ROWS], finite=False)
            if count == 0:
                mean, scatter = rows[0].copy(), np.zeros((rows.shape[1],) * 2, order="F")
                buffer = np.empty((BLOCK_ROWS, rows.shape[1]))
            check.shape(op, rows.shape[1:] == mean.shape, "blocks of one width", block=block, mean=mean)
            n = count + len(rows)
            centred = np.subtract(rows, mean, out=buffer[: len(rows)])
            delta = centred.sum(axis=0) / len(rows)
            if not np.isfinite(delta).all():
                # A NaN or an infinity among the rows shows here, without a pass of its own.
                check.real(op, "blocks", rows)
            centred -= (1 - math.sqrt(count / n)) * delta
            # The upper triangle grows in place: no copy of rows, no temporary of (d, d).
            scatter = dsyrk(1.0, centred.T, beta=1.0, c=scatter, overwrite_c=1)
            count, mean = n, mean + delta * (len(rows) / n)
    check.shape(op, count > 0, "at least one row", mean=mean)
    return Moments(count, mean, np.triu(scatter) + np.triu(scatter, 1).T)


def covariance(m: Moments, *, beta: float) -> Float[np.ndarray, "d d"]:
    """Second moment of the rows around beta times their mean.

        Sigma = (1/n) sum (x - beta mean)^T (x - beta mean) = scatter / n + (1 - beta)^2 mean^T mean

    C1. beta must act inside Sigma as well as in `transform`.
    C2. The divisor must be n, not n - 1 (cosines do not see the difference).

    Raises: DomainError without rows or for a beta that is not finite.
    Source: kexue.fm 9079. Differs: implementations that soften only the transform, with the centred Sigma.
    """
    op = "whitening.covariance"
    check.domain(op, m.count >= 1, "at least one row", count=m.count)
    check.domain(op, math.isfinite(beta), "a finite beta", beta=beta)
    return m.scatter / m.count + (1 - beta) ** 2 * np.outer(m.mean, m.mean)


def spectrum(sigma: Shaped[np.ndarray, "*_ d"]) -> Spectrum:
    """Eigenvalues of a symmetric matrix in descending order, with eigenvectors of a fixed sign.

        sigma = U diag(values) U^T,   U^T U = 1

    C1. Values must descend, and the columns of U be orthonormal.
    Signs are fixed so that runs repeat: the largest entry by magnitude of a column (the first of equals) is positive.

    Raises: ShapeError unless square; DomainError unless symmetric.
    Precision: values to d 2^-52 of the largest; vectors of close values are arbitrary within their space.
    """
    op = "whitening.spectrum"
    sigma = check.real(op, "sigma", sigma)
    check.shape(op, sigma.ndim == 2 and sigma.shape[0] == sigma.shape[1], "sigma (d, d)", sigma=sigma)
    skew = float(abs(sigma - sigma.T).max(initial=0.0))
    check.domain(op, skew <= 1e-6 * float(abs(sigma).max(initial=0.0)), "a symmetric sigma", skew=skew)
    values, vectors = np.linalg.eigh(sigma)
    values, vectors = values[::-1], vectors[:, ::-1]
    peak = vectors[abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    return Spectrum(values, vectors * np.where(peak < 0, -1.0, 1.0))


def rank(values: Shaped[np.ndarray, "*d"]) -> int:
    """Number of eigenvalues above the floor: below it they are rounding errors of zero.

        rank = #{ values > max(values) d 2^-52 }

    C1. Constant data must have rank 0; n rows of d > n features at most n - 1 with beta = 1.

    Source: the cut of numpy.linalg.matrix_rank. Differs: the authors' code has none; an eigenvalue of 1e-16 then
    gives a column 1e8 times too large, which decides every cosine.
    """
    values = check.real("whitening.rank", "values", values)
    check.shape("whitening.rank", values.ndim == 1, "values (d,)", values=values)
    return int((values > values.max(initial=0.0) * len(values) * 2.0**-52).sum())


def projection(sigma: Shaped[np.ndarray, "*_ d"], *, gamma: float, k: int) -> Float[np.ndarray, "d k"]:
    """The matrix W that keeps k components and takes out the share gamma of their scale.

        W = U[:, :k] diag(values[:k]^(-gamma / 2))

    C1. gamma = 1 must give W^T sigma W = 1, gamma = 0 the eigenvectors themselves, whatever their values.
    C2. The k largest eigenvalues must be kept.

    Raises: DomainError for k outside 1..d, for k > rank where gamma > 0, for a negative gamma.
    Precision: relative error of a column about d 2^-52 values[0] / values[k - 1].
    Source: kexue.fm 8069, 9079. Differs: the authors' command line reads k = 0 as no whitening, k < 0 as all.
    """
    op = "whitening.projection"
    values, vectors = _kept_spectrum(op, sigma, gamma, k)
    check.domain(op, gamma == 0 or k <= rank(values), "k <= rank of sigma where gamma > 0", k=k, rank=rank(values))
    return _scaled(values[:k], vectors[:, :k], gamma)


def projection_null_zero(sigma: Shaped[np.ndarray, "*_ d"], *, gamma: float, k: int) -> Float[np.ndarray, "d k"]:
    """`projection` as a pseudo-inverse: components without variance become zero columns instead of an error.

    C1. Must equal `projection` for k <= rank; the columns beyond must be zero where gamma > 0.

    Raises: DomainError for k outside 1..d or a negative gamma.
    """
    values, vectors = _kept_spectrum("whitening.projection_null_zero", sigma, gamma, k)
    kept = np.arange(k) < (rank(values) if gamma > 0 else k)
    return _scaled(values[:k] * kept + ~kept, vectors[:, :k] * kept, gamma)


def transform(
    x: Shaped[np.ndarray, "*n d"], mean: Shaped[np.ndarray, "*_"], w: Shaped[np.ndarray, "*_ k"], *, beta: float
) -> Float[np.ndarray, "*n k"]:
    """Rows shifted by beta times the mean, then projected.

        y = (x - beta mean) W

    C1. beta must be the one W was fitted with.

    Raises: ShapeError unless (..., d), (d,), (d, k). Source: kexue.fm 9079.
    """
    op = "whitening.transform"
    x, mean, w = check.real(op, "x", x), check.real(op, "mean", mean), check.real(op, "w", w)
    fits = x.ndim >= 1 and mean.ndim == 1 and w.ndim == 2 and x.shape[-1] == mean.shape[0] == w.shape[0]
    check.shape(op, fits, "x (..., d), mean (d,), w (d, k)", x=x, mean=mean, w=w)
    check.domain(op, math.isfinite(beta), "a finite beta", beta=beta)
    return (x - beta * mean) @ w


def normalize(x: Shaped[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Rows divided by their Euclidean norm, itself clipped from below.

        y = x / max(|x|, NORM_FLOOR)

    C1. A zero row must stay zero; the clip must act on the norm, not be added to it.

    Raises: DomainError for NaN or infinity. Source: the authors' code.
    """
    x = check.real("whitening.normalize", "x", x)
    check.shape("whitening.normalize", x.ndim >= 1, "x (..., d)", x=x)
    return x / np.maximum(np.sqrt((x * x).sum(axis=-1, keepdims=True)), NORM_FLOOR)


def whiten(
    sample: Shaped[np.ndarray, "*_ d"], x: Shaped[np.ndarray, "*n _d"], *, beta: float, gamma: float, k: int
) -> Float[np.ndarray, "*n k"]:
    """Normalised rows of x under the whitening fitted on `sample`: fit, transform, normalise.

    C1. Inner products of the result must not change with the signs of eigenvectors, a common scale of sample and x,
        or a shift of both where beta = 1.

    Raises: as its parts. Source: kexue.fm 8069, 9079. Whitening is (1, 1, k), PCA (1, 0, k), a rotation (0, 0, d).
    """
    m = moments(sample)
    return normalize(transform(x, m.mean, projection(covariance(m, beta=beta), gamma=gamma, k=k), beta=beta))


def spearman(a: Shaped[np.ndarray, "*b n"], b: Shaped[np.ndarray, "*_"]) -> Float[np.ndarray, "*b"]:
    """Spearman's rank correlation along the last axis: Pearson's of the ranks, equal values sharing the mean of theirs.

    C1. Ties must get average ranks.
    C2. A constant vector has no order: the result must be NaN.

    Raises: ShapeError unless two arrays of one shape, n >= 2. Source: kexue.fm 8069 (reported times 100).
    """
    op = "whitening.spearman"
    a, b = check.real(op, "a", a), check.real(op, "b", b)
    check.shape(op, a.ndim >= 1 and a.shape == b.shape and a.shape[-1] >= 2, "a (..., n), b (..., n), n >= 2", a=a, b=b)
    left, right = (np.apply_along_axis(_average_ranks, -1, v) - (v.shape[-1] - 1) / 2 for v in (a, b))
    spread = np.asarray(np.sqrt((left * left).sum(axis=-1) * (right * right).sum(axis=-1)))
    with np.errstate(invalid="ignore"):
        return np.asarray((left * right).sum(axis=-1) / spread)


def search(
    m: Moments,
    score: Callable[[Callable[[np.ndarray], np.ndarray]], float],
    *,
    betas: Sequence[float],
    gammas: Sequence[float],
    ks: Sequence[int],
) -> Search:
    """The (beta, gamma, k) of a grid with the highest score, and the score of every point.

        score(encode) -> float,   encode(x) = normalize(transform(x, ...))

    C1. Every point must be scored once, betas outermost; the first of equal scores must win, and NaN never.

    Raises: DomainError for an empty grid, only NaN scores, or a point that `projection` refuses. Source: kexue.fm 9079.
    """
    op = "whitening.search"
    ks = [int(check.integer(op, "k", k)) for k in ks]
    check.domain(op, min(ks, default=1) >= 1, "every k >= 1", ks=ks)
    trials = []
    for beta in betas:
        sigma = covariance(m, beta=beta)
        for gamma in gammas:
            full = projection(sigma, gamma=gamma, k=max(ks, default=1))
            for k in ks:
                encode = partial(_encode, mean=m.mean, w=full[:, :k], beta=beta)
                trials.append(Trial(beta, gamma, k, float(score(encode))))
    ranked = [t for t in trials if not math.isnan(t.score)]
    check.domain(op, bool(ranked), "a grid with a score that is a number", points=len(trials))
    return Search(max(ranked, key=lambda t: t.score), tuple(trials))


def _encode(x: np.ndarray, *, mean: np.ndarray, w: np.ndarray, beta: float) -> np.ndarray:
    return normalize(transform(x, mean, w, beta=beta))


def _kept_spectrum(op: str, sigma: np.ndarray, gamma: float, k: int) -> Spectrum:
    check.domain(op, 0 <= gamma < math.inf, "gamma >= 0", gamma=gamma)
    values, vectors = spectrum(sigma)
    k = int(check.integer(op, "k", k))
    check.domain(op, 1 <= k <= len(values), f"k in 1..{len(values)}", k=k)
    return Spectrum(values, vectors)


def _scaled(values: np.ndarray, vectors: np.ndarray, gamma: float) -> np.ndarray:
    # Null eigenvalues may come out negative: without a power to take they are never touched.
    return vectors * values ** (-gamma / 2) if gamma > 0 else vectors


def _average_ranks(v: np.ndarray) -> np.ndarray:
    ordered = np.sort(v)
    return (np.searchsorted(ordered, v, side="left") + np.searchsorted(ordered, v, side="right") - 1) / 2
