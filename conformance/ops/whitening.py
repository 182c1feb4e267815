"""Judging whitening: moments in any order, the spectrum and what is left of it; never eigenvectors themselves."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.budget import LIBM, MP, Arithmetic, Ball, Profile, einsum, gamma, sqrt, where
from conformance.case import Case, Function, Operator
from conformance.generate import Draw, drawn
from conformance.law import Law, close, equal, run
from conformance.mutant import Mutant
from refimpl.ops import whitening
from refimpl.ops.whitening import Moments


# What an implementation is called with: flat arguments.
def _moments(x):
    m = whitening.moments(x)
    return m.mean, m.scatter


def _moments_streamed(x, sizes):
    """x cut into blocks of these sizes; what is left is the last block."""
    m = whitening.moments_streamed(np.split(x, np.cumsum(sizes)))
    return m.mean, m.scatter


def _merge(count_a, mean_a, scatter_a, count_b, mean_b, scatter_b):
    m = whitening.merge(Moments(count_a, mean_a, scatter_a), Moments(count_b, mean_b, scatter_b))
    return m.mean, m.scatter


def _covariance(count, mean, scatter, beta):
    return whitening.covariance(Moments(count, mean, scatter), beta=beta)


# References.
def moments(a: Arithmetic, x: Ball) -> tuple[Ball, Ball]:
    """Mean and (x - mean)^T (x - mean). The error of the mean counts once per row: merging may show it."""
    n = x.shape[0]
    if n == 0:
        return a.exact(np.zeros(x.shape[1])), a.exact(np.zeros((x.shape[1],) * 2))
    mean = x.sum(0) / float(n)
    centred = (x - mean).stored()
    return mean, einsum("ni,nj->ij", centred, centred, length=2 * n + 4)


def moments_streamed(a: Arithmetic, x: Ball, sizes: tuple[int, ...]) -> tuple[Ball, Ball]:
    """The same whatever the blocks are; every block may round a mean and a scatter."""
    mean, scatter = moments(a, x)
    blocks, eager = len(sizes) + 1, a.profile.name == "eager" and a.profile.sixteen_bit
    once = gamma(4 * blocks, a.unit) + (4 * blocks * a.profile.storage if eager else 0.0)
    deviation = np.abs(x.value - mean.value)
    drift = once * (np.abs(x.value).max(0, initial=0.0) + mean.magnitude)
    cross = deviation.sum(0)[:, None] * drift[None] + len(deviation) * drift[:, None] * drift[None]
    size = np.sqrt(np.outer(np.diag(scatter.magnitude), np.diag(scatter.magnitude)))
    return a.ball(mean.mid, mean.rad + drift), a.ball(scatter.mid, scatter.rad + cross + cross.T + once * size)


def merge(
    a: Arithmetic, count_a: int, mean_a: Ball, scatter_a: Ball, count_b: int, mean_b: Ball, scatter_b: Ball
) -> tuple[Ball, Ball]:
    """Chan's update; without rows it is the neutral element."""
    n = max(count_a + count_b, 1)
    delta = mean_b - mean_a
    share = a.exact(float(count_b)) / float(n)
    outer = einsum("i,j->ij", delta, delta) * (share * float(count_a))
    # delta n_b / n may be formed as (n_a mean_a + n_b mean_b) / n as well.
    mean = (mean_a * (a.exact(float(count_a)) / float(n)) + mean_b * share) if count_a + count_b else mean_a
    other = mean_a + delta * share
    mean = a.ball(other.mid, np.maximum(mean.rad, other.rad))
    return mean, scatter_a + scatter_b + outer


def covariance(a: Arithmetic, count: int, mean: Ball, scatter: Ball, beta: float) -> Ball:
    """scatter / n + (1 - beta)^2 mean^T mean."""
    soft = a.exact(1.0) - beta
    return scatter / float(count) + einsum("i,j->ij", mean, mean) * (soft * soft)


def _eigen(a: Arithmetic, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Descending eigenvalues and eigenvectors, in 50 digits or in float64."""
    if sigma.dtype != object:
        values, vectors = np.linalg.eigh(sigma)
        return values[::-1].copy(), vectors[:, ::-1].copy()
    values, vectors = MP.eigsy(MP.matrix(sigma.tolist()))
    d = len(sigma)
    value = np.array([values[i] for i in range(d)], dtype=object)
    vector = np.array([[vectors[i, j] for j in range(d)] for i in range(d)], dtype=object)
    order = np.argsort(-value.astype(np.float64), kind="stable")
    return value[order], vector[:, order]


def _null(values: np.ndarray) -> np.ndarray:
    """Eigenvalues that are rounding errors of zero."""
    return values <= max(values.max(initial=0.0), 0.0) * len(values) * 2.0**-52


def _solver(a: Arithmetic, d: int) -> float:
    """Backward error of a symmetric eigensolver and of the products that are formed with its vectors."""
    return 8 * d * a.unit + 4 * d * a.profile.storage


def spectrum(a: Arithmetic, sigma: Ball) -> tuple[Ball, Ball, Ball]:
    """Eigenvalues (Weyl), U diag(values) U^T = sigma, U^T U = 1."""
    d = sigma.shape[0]
    values, _ = _eigen(a, sigma.mid)
    size = float(np.abs(values.astype(np.float64)).max(initial=0.0))
    bound = _solver(a, d)
    return a.ball(values, bound * size), a.ball(sigma.mid, bound * size), a.ball(np.eye(d), bound)


def _observe_spectrum(arguments, outputs):
    values, vectors = outputs
    return values, vectors * values @ vectors.T, vectors.T @ vectors


def _powers(a: Arithmetic, values: np.ndarray, exponent: float, kept: np.ndarray) -> np.ndarray:
    """values^exponent where kept, 0 elsewhere."""
    if values.dtype != object:
        return np.where(kept, np.where(kept, values, 1.0) ** exponent, 0.0)
    return np.array(
        [MP.power(v, MP.mpf(exponent)) if k else MP.mpf(0) for v, k in zip(values, kept, strict=True)], dtype=object
    )


def _divided(values: np.ndarray, g: np.ndarray, slopes: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """|g_i - g_j| / |values_i - values_j|, and the slope between equal ones: how g(sigma) follows sigma."""
    gap = np.abs(values[:, None] - values[None])
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.abs(g[:, None] - g[None]) / gap
    steepest = np.maximum(slopes[:, None], slopes[None])
    both, neither = kept[:, None] & kept[None], ~kept[:, None] & ~kept[None]
    return np.where(both, steepest, np.where(neither, 0.0, np.where(gap > 0, quotient, np.inf)))


class _Fit:
    """Kept eigenvalues and the kernel W W^T = U g(Lambda) U^T of a projection, with what an error E of sigma does.

    First order: U^T delta(W W^T) U = D * (U^T E U), D the divided differences of g; doubled for the higher orders,
    and unknown where E reaches a quarter of a kept eigenvalue or of the gap behind the last one.
    """

    def __init__(self, a: Arithmetic, sigma: Ball, gamma_: float, k: int) -> None:
        self.values, self.vectors = _eigen(a, sigma.mid)
        d, plain, u = len(self.values), self.values.astype(np.float64), self.vectors.astype(np.float64)
        kept = np.arange(d) < k
        self.kept = kept & ~_null(plain) if gamma_ > 0 else kept
        self.g = _powers(a, self.values, -gamma_, self.kept)
        g = self.g.astype(np.float64)
        error = np.abs(u).T @ sigma.rad @ np.abs(u) + _solver(a, d) * max(plain.max(initial=0.0), 0.0)
        size = float(np.linalg.norm(error, 2))
        slopes = np.where(self.kept, gamma_ * g / np.where(self.kept, np.maximum(plain, 1e-300), 1.0), 0.0)
        smallest = np.where(self.kept, plain, np.inf).min(initial=np.inf)
        gaps = np.abs(plain[self.kept][:, None] - plain[~self.kept][None]).min(initial=np.inf)
        lost = (gamma_ > 0 and size > smallest / 4) or size > gaps / 4
        self.error = np.full((d, d), np.inf) if lost else 2 * _divided(plain, g, slopes, self.kept) * error
        with np.errstate(divide="ignore"):
            logs = np.abs(np.log(np.where(self.kept & (plain > 0), np.maximum(plain, 1e-300), 1.0)))
        # Relative error of a column of W: the power, and the column's rounding to storage.
        self.column = (LIBM + 2 * gamma_ * logs.max(initial=0.0) + 2) * a.unit + 2 * a.profile.storage
        self.sigma_error = size
        self.plain, self.basis, self.scale = plain, u, g

    def kernel(self, a: Arithmetic) -> Ball:
        """W W^T."""
        middle = (self.vectors * self.g) @ self.vectors.T
        diagonal = np.sqrt(np.maximum(np.diag(middle).astype(np.float64), 0.0))
        with np.errstate(invalid="ignore"):
            moved = np.nan_to_num(np.abs(self.basis) @ self.error @ np.abs(self.basis).T, nan=np.inf)
        return a.ball(middle, moved + 4 * self.column * np.outer(diagonal, diagonal))

    def whitened(self, a: Arithmetic, k: int) -> Ball:
        """W^T sigma W = diag(values^(1 - gamma)), zero for null components."""
        left = self.values[:k] * self.g[:k]
        middle = np.diag(left) if left.dtype != object else np.where(np.eye(k) == 1, left[None], MP.mpf(0))
        root = np.sqrt(self.scale[:k])
        rad = 2 * self.sigma_error * np.outer(root, root) + np.eye(k) * 4 * self.column * left.astype(np.float64)
        if not np.isfinite(self.error).all():
            # Only the spectrum is known where a gap is lost: errors of values enter through the power.
            rad = rad + (np.inf if self.sigma_error > self.plain[:k][self.kept[:k]].min(initial=np.inf) / 4 else 0.0)
        return a.ball(middle, rad * 2)


def projection(a: Arithmetic, sigma: Ball, gamma: float, k: int) -> tuple[Ball, Ball]:
    """W^T sigma W and W W^T: both the same for every choice of eigenvectors."""
    fit = _Fit(a, sigma, gamma, k)
    return fit.whitened(a, k), fit.kernel(a)


def _observe_projection(arguments, outputs):
    (w,) = outputs
    return w.T @ arguments["sigma"] @ w, w @ w.T


def transform(a: Arithmetic, x: Ball, mean: Ball, w: Ball, beta: float) -> Ball:
    """(x - beta mean) W, or x W - (beta mean) W."""
    shifted = (x - mean * beta).stored()
    return einsum("nd,dk->nk", shifted, w, length=2 * x.shape[-1] + 3)


def normalize(a: Arithmetic, x: Ball) -> Ball:
    """x / max(|x|, 1e-8)."""
    norm = sqrt(einsum("nd,nd->n", x, x))[:, None]
    floor = a.exact(np.full(norm.shape, 1e-8))
    clipped = where(norm.value > 1e-8, norm, floor)
    near = np.abs(norm.value - 1e-8) <= norm.rad
    clipped = a.ball(clipped.mid, np.where(near, norm.rad, clipped.rad))
    return x / clipped


def whiten(a: Arithmetic, sample: Ball, x: Ball, beta: float, gamma: float, k: int) -> Ball:
    """Cosines of the whitened rows: (x - beta mean) W W^T (x - beta mean)^T over the norms."""
    mean, scatter = moments(a, sample)
    fit = _Fit(a, covariance(a, sample.shape[0], mean, scatter, beta), gamma, k)
    shifted = x - mean * beta
    z = shifted.mid @ fit.vectors
    gram = (z * fit.g) @ z.T
    plain = np.abs(z.astype(np.float64))
    with np.errstate(invalid="ignore"):
        moved = np.nan_to_num(plain @ fit.error @ plain.T, nan=np.inf)
    # A row of y in the Euclidean norm: roundings of the product, and of x - beta mean. No choice of basis enters.
    size = np.sqrt(np.maximum(np.diag(gram).astype(np.float64), 0.0))
    norms = np.sqrt((shifted.value**2).sum(1))
    product = (_dot(a, x.shape[1]) + fit.column) * norms * np.sqrt(fit.scale.sum())
    row = product + np.sqrt((shifted.rad**2).sum(1)) * np.sqrt(fit.scale.max(initial=0.0))
    rad = moved + np.outer(row, size) + np.outer(size, row) + np.outer(row, row)
    root = _root(np.diag(gram))
    scale = np.outer(size, size)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.diag(rad) / size**2
        cosine = gram / (root[:, None] * root[None])
        value = np.abs(cosine.astype(np.float64))
        spread = rad / scale + value * (relative[:, None] + relative[None])
    spread = np.where(np.isnan(spread) | (np.maximum(relative[:, None], relative[None]) > 0.25), np.inf, 1.5 * spread)
    return a.ball(cosine, spread + _dot(a, k) + 4 * a.profile.storage)


def _dot(a: Arithmetic, length: int) -> float:
    return float(gamma(length + 4, a.unit)) + 2 * a.profile.storage


def _root(x: np.ndarray) -> np.ndarray:
    return np.sqrt(x) if x.dtype != object else np.array([MP.sqrt(v) for v in x], dtype=object)


def _observe_cosines(arguments, outputs):
    (y,) = outputs
    return (y @ y.T,)


def _ranks(v: np.ndarray) -> np.ndarray:
    """Twice the average ranks, centred: integers."""
    less = (v[..., :, None] > v[..., None, :]).sum(-1)
    same = (v[..., :, None] == v[..., None, :]).sum(-1)
    return 2 * less + same - v.shape[-1]


def spearman(arithmetic: Arithmetic, a: Ball, b: Ball) -> Ball:
    """Pearson's correlation of the average ranks; NaN for a constant."""
    one, two = _ranks(a_.value), _ranks(b.value)
    top, bottom = (one * two).sum(-1).astype(np.float64), ((one**2).sum(-1) * (two**2).sum(-1)).astype(np.float64)
    constant = bottom == 0
    made = a.exact(top) / sqrt(a.exact(np.where(constant, 1.0, bottom)))
    n = a_.shape[-1]
    # Any order of the sums of ranks; sums of squares of both, a root and a quotient; eager stores each.
    eager = a.profile.storage if a.profile.name == "eager" and a.profile.sixteen_bit else 0.0
    size = np.sqrt((one**2).sum(-1) * (two**2).sum(-1)).astype(np.float64)
    rad = made.rad + (gamma(2 * n + 6, a.unit) + 8 * eager) * (1 + np.abs(top) / np.where(constant, 1.0, size))
    return where(constant, a.exact(np.full(top.shape, np.nan)), a.ball(made.mid, rad))


def _spearman(a: Arithmetic, **arguments: Ball) -> Ball:
    return spearman(a, arguments["a"], arguments["b"])
