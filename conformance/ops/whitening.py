"""Judging whitening: moments in any order, the spectrum and what is left of it; never eigenvectors themselves."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.budget import DTYPES, LIBM, MP, Arithmetic, Ball, Profile, einsum, gamma, sqrt, where
from conformance.case import SPEC, Case, Function, Operator
from conformance.generate import Draw, drawn
from conformance.law import Law, close, equal, run
from conformance.mutant import Mutant
from refimpl.ops import whitening


# What an implementation is called with: flat arguments.
def _moments(x, *, of=SPEC):
    m = of.whitening.moments(x)
    return m.mean, m.scatter


def _moments_streamed(x, sizes, *, of=SPEC):
    """x cut into blocks of these sizes; what is left is the last block."""
    cuts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    blocks = [*(x[a:b] for a, b in pairwise(cuts)), x[cuts[-1] :]]
    m = of.whitening.moments_streamed(blocks)
    return m.mean, m.scatter


def _merge(count_a, mean_a, scatter_a, count_b, mean_b, scatter_b, *, of=SPEC):
    family = of.whitening
    m = family.merge(family.Moments(count_a, mean_a, scatter_a), family.Moments(count_b, mean_b, scatter_b))
    return m.mean, m.scatter


def _covariance(count, mean, scatter, beta, *, of=SPEC):
    return of.whitening.covariance(of.whitening.Moments(count, mean, scatter), beta=beta)


# References.
def moments(a: Arithmetic, x: Ball) -> tuple[Ball, Any]:
    """Mean and (x - mean)^T (x - mean). The error of the mean counts once per row: merging may show it."""
    n = x.shape[0]
    if n == 1:
        # One row is its own mean, without any rounding.
        return x[0], np.zeros((x.shape[1],) * 2)
    mean = x.sum(0) / float(n)
    centred = (x - mean).stored()
    return mean, einsum("ni,nj->ij", centred, centred, length=2 * n + 4)


def moments_streamed(a: Arithmetic, x: Ball, sizes: tuple[int, ...]) -> tuple[Ball, Any]:
    """The same whatever the blocks are; every block may round a mean and a scatter."""
    mean, scatter = moments(a, x)
    if x.shape[0] == 1:
        return mean, scatter
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
    return 4 * d * a.unit + 2 * a.profile.storage


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
    one, two = _ranks(a.value), _ranks(b.value)
    top, bottom = (one * two).sum(-1).astype(np.float64), ((one**2).sum(-1) * (two**2).sum(-1)).astype(np.float64)
    constant = bottom == 0
    made = arithmetic.exact(top) / sqrt(arithmetic.exact(np.where(constant, 1.0, bottom)))
    # Sums of products of ranks in any order, a root and a quotient; eager stores each of them.
    profile = arithmetic.profile
    eager = 8 * profile.storage if profile.name == "eager" and profile.sixteen_bit else 0.0
    rad = made.rad + 2 * (gamma(2 * a.shape[-1] + 6, arithmetic.unit) + eager)
    nan = arithmetic.exact(np.full(top.shape, np.nan))
    return where(constant, nan, arithmetic.ball(made.mid, rad))


OPERATORS = (
    Operator("whitening.moments", _moments, moments, ("mean", "scatter")),
    Operator("whitening.moments_streamed", _moments_streamed, moments_streamed, ("mean", "scatter")),
    Operator("whitening.merge", _merge, merge, ("mean", "scatter")),
    Operator("whitening.covariance", _covariance, covariance, ("sigma",)),
    Operator(
        "whitening.spectrum", whitening.spectrum, spectrum, ("values", "vectors"),
        observe=_observe_spectrum, observables=("values", "matrix", "gram"),
    ),
    *(
        Operator(
            f"whitening.{function.__name__}", function, projection, ("w",),
            observe=_observe_projection, observables=("whitened", "kernel"),
        )
        for function in (whitening.projection, whitening.projection_null_zero)
    ),
    Operator("whitening.transform", whitening.transform, transform, multilinear=True),
    Operator("whitening.normalize", whitening.normalize, normalize),
    Operator("whitening.whiten", whitening.whiten, whiten, observe=_observe_cosines, observables=("cosines",)),
    Operator("whitening.spearman", whitening.spearman, spearman, ("correlation",)),
)  # fmt: skip


# Cases.
def _case(op: str, name: str, clauses: str, *, exact: bool = False, only: tuple[str, ...] = (), **arguments) -> Case:
    return Case(f"whitening.{op}", name, arguments, tuple(clauses.split()), exact, only=only or DTYPES)


# An eigensolver in 16 bits is nobody's: what is fitted is fitted in float32 at least.
WIDE = ("float64", "float32")
FINE = ("float64", "float32", "float16")
# Counts beyond 65504, and 1e-8, are nothing for float16.
RANGE = ("float64", "float32", "bfloat16")


def _rows() -> dict[str, np.ndarray]:
    draw = Draw("whitening/rows")
    ill = Draw("whitening/ill").grid(13, 3, exponent=-7) + 8192.0
    return {
        "grid": draw.grid(11, 5),
        "dense": draw.dense(7, 3),
        "one-row": draw.grid(1, 5),
        "two-rows": draw.grid(2, 3),
        "offset": draw.grid(7, 3, low=-15, high=15, exponent=0) + 240.0,
        "ill-centred": ill,
        "far-off": np.ldexp(draw.grid(13, 3, exponent=0), -24) + 1024.0,
        "constant-column": draw.grid(5, 3) * [1, 0, 1] + [0, 1.5, 0],
    }


_EXACT_ROWS = {
    "exact-eight": np.array([[1.0, -3], [3, 1], [5, 5], [7, -3], [1, 1], [3, -3], [5, 1], [7, 1]]),
    "exact-cancelling": np.array([[65.0, -63], [-63.0, 65], [65, 65], [-63, -63]]),
}
_SIZES = {"grid": (3, 1, 4), "dense": (1, 1, 1, 1), "offset": (2,), "ill-centred": (1, 5, 2), "far-off": (4, 4, 3),
          "constant-column": (2, 2), "exact-eight": (4, 2), "exact-cancelling": (2,)}  # fmt: skip


def _of_rows(op: str) -> tuple[Case, ...]:
    made, streamed = partial(_case, op), op == "moments_streamed"
    cases = []
    for name, x in (_rows() | _EXACT_ROWS).items():
        if streamed and name not in _SIZES:
            continue
        clauses = "C1 C2" if streamed or len(x) == 1 else "C1"
        more = {"sizes": _SIZES[name]} if streamed else {}
        # A stream rounds the weights of its blocks.
        only = FINE if streamed and name in ("offset", "exact-cancelling") else ()
        cases.append(made(name, clauses, exact=name.startswith("exact") and not streamed, only=only, x=x, **more))
    return tuple(cases)


_merged = partial(_case, "merge")


def _exchanged(sides: dict[str, Any]) -> dict[str, Any]:
    """The two sides of a merge exchanged."""
    return {n[:-1] + {"a": "b", "b": "a"}[n[-1]]: v for n, v in sides.items()}


_m = Draw("whitening/merge")


def _sides(count_a: int, count_b: int, d: int = 3, offset: float = 0.0) -> dict[str, Any]:
    """Scatters are Gram matrices of few-bit rows."""
    rows = [_m.grid(3, d, low=-7, high=7, exponent=-1) for _ in range(2)]
    return {
        "count_a": count_a, "mean_a": _m.grid(d) + offset, "scatter_a": rows[0].T @ rows[0] * (count_a > 1),
        "count_b": count_b, "mean_b": _m.grid(d) + offset, "scatter_b": rows[1].T @ rows[1] * (count_b > 1),
    }  # fmt: skip


def _none(d: int = 3) -> dict[str, Any]:
    return {"count_b": 0, "mean_b": np.zeros(d), "scatter_b": np.zeros((d, d))}


_cov = partial(_case, "covariance")
_c = Draw("whitening/covariance")


def _gathered(count: int, d: int = 3) -> dict[str, Any]:
    rows = _c.grid(5, d, low=-7, high=7, exponent=-1)
    return {"count": count, "mean": _c.grid(d), "scatter": rows.T @ rows}


def _symmetric(name: str, d: int, rows: int, low: int = -3, high: int = 3) -> np.ndarray:
    g = Draw(f"whitening/{name}").grid(rows, d, low=low, high=high, exponent=0)
    return g.T @ g / 4


_SIGMAS = {
    "five": _symmetric("five", 5, 11),
    "three": _symmetric("three", 3, 7),
    "one": np.array([[2.25]]),
    "diagonal": np.diag([4.0, 16, 1, 64]),
    "double": np.diag([2.0, 8, 8, 1]),
    "correlated": np.array([[1.0, 0.9375, 0.875], [0.9375, 1, 0.9375], [0.875, 0.9375, 1]]),
    "wide-range": np.diag([64.0, 1, 0.0625]) + 0.015625 * np.ones((3, 3)),
}
# Two eigenvalues 3 and one 0.75 turned out of the axes: every basis of the plane is right.
_PLANE = np.array([[2.25, 0.75, 0.75], [0.75, 2.25, 0.75], [0.75, 0.75, 2.25]]) * [[1, -1, 1], [-1, 1, -1], [1, -1, 1]]
# The third feature is the sum of the others; the last one never varies.
_NULL = np.array([[2.0, 1, 3, 0], [1, 5, 6, 0], [3, 6, 9, 0], [0, 0, 0, 0]])


def _projections(op: str) -> tuple[Case, ...]:
    made = partial(_case, op, only=WIDE)
    everything = "C1 C2" if op == "projection" else "C1"
    return (
        *(made(f"{name}-gamma-1", everything, sigma=s, gamma=1.0, k=len(s)) for name, s in _SIGMAS.items()),
        made("five-gamma-1-k-2", everything, sigma=_SIGMAS["five"], gamma=1.0, k=2),
        made("five-gamma-0-k-3", everything, sigma=_SIGMAS["five"], gamma=0.0, k=3),
        made("five-gamma-0.5", everything, sigma=_SIGMAS["five"], gamma=0.5, k=5),
        made("diagonal-gamma-0.25-k-3", everything, sigma=_SIGMAS["diagonal"], gamma=0.25, k=3),
        made("plane-gamma-1-k-2", everything, sigma=_PLANE[::-1, ::-1], gamma=0.5, k=3),
        made("double-not-cut", everything, sigma=_SIGMAS["double"], gamma=1.0, k=2),
        made("null-gamma-0", everything, sigma=_NULL, gamma=0.0, k=4),
        made("null-k-rank", everything, sigma=_NULL, gamma=1.0, k=2),
    )  # fmt: skip


_null_zero = partial(_case, "projection_null_zero", only=("float64",))
_transform = partial(_case, "transform")
_t = Draw("whitening/transform")
_normalize = partial(_case, "normalize")
_n = Draw("whitening/normalize")
_whiten = partial(_case, "whiten", only=WIDE)
_w = Draw("whitening/whiten")
_SAMPLE, _X = _w.grid(13, 4, low=-31, high=31, exponent=-3), _w.grid(5, 4, low=-31, high=31, exponent=-3)
_spearman = partial(_case, "spearman")
_s = Draw("whitening/spearman")

CASES = (
    *_of_rows("moments"),
    *_of_rows("moments_streamed"),
    _merged("grid", "C1", **_sides(5, 3)),
    _merged("single-rows", "C1", **_sides(1, 1)),
    _merged("one-and-many", "C1", **_sides(1, 1000)),
    _merged("neutral", "C1", **(_sides(7, 3) | _none())),
    _merged("neutral-first", "C1", **_exchanged(_sides(7, 3) | _none())),
    _merged("offset", "C1", **_sides(6, 11, offset=4096.0)),
    _merged("large-counts", "C1", **_sides(3_000_000, 1_000_001), only=RANGE),
    _merged("exact-halves", "C1", exact=True, **(_sides(2, 2) | {"mean_a": np.array([3.0, -1, 5]),
            "mean_b": np.array([1.0, 3, 1])})),
    _merged("exact-quarter", "C1", exact=True, **(_sides(6, 2) | {"mean_a": np.array([1.0, 2, 4]),
            "mean_b": np.array([3.0, -2, 4])})),
    _cov("beta-1", "C1 C2", **_gathered(7), beta=1.0),
    _cov("beta-0", "C1 C2", **_gathered(7), beta=0.0),
    _cov("beta-0.5", "C1 C2", **_gathered(11), beta=0.5),
    _cov("beta-1.5", "C1 C2", **_gathered(3), beta=1.5),
    _cov("one-row", "C2", **(_gathered(1) | {"scatter": np.zeros((3, 3))}), beta=0.25),
    _cov("exact-beta-0", "C1 C2", exact=True, count=8, mean=np.array([1.0, -3]),
         scatter=np.array([[8.0, 24], [24, 16]]), beta=0.0),
    _cov("exact-beta-0.5", "C1 C2", exact=True, count=2, mean=np.array([2.0, -4]),
         scatter=np.array([[4.0, -2], [-2, 6]]), beta=0.5),
    *(_case("spectrum", name, "C1", only=WIDE, sigma=s)
      for name, s in (_SIGMAS | {"plane": _PLANE, "null": _NULL}).items() if len(s) > 1),
    *_projections("projection"),
    *_projections("projection_null_zero"),
    _null_zero("null-gamma-1", "C1", sigma=_NULL, gamma=1.0, k=4),
    _null_zero("null-gamma-0.5-k-3", "C1", sigma=_NULL, gamma=0.5, k=3),
    *(_case("projection_null_zero", f"axes-gamma-{g}", "C1", only=WIDE, sigma=np.diag([0.0, 4, 0, 1]), gamma=g, k=3)
      for g in (0.5, 1.0)),
    _transform("grid", "C1", x=_t.grid(5, 7), mean=_t.grid(7), w=_t.grid(7, 3), beta=1.0),
    _transform("dense", "C1", x=_t.dense(3, 5), mean=_t.dense(5), w=_t.dense(5, 2), beta=0.3),
    _transform("beta-0", "C1", x=_t.grid(2, 5), mean=_t.grid(5), w=_t.grid(5, 5), beta=0.0),
    _transform("offset", "C1", x=_t.grid(3, 5, exponent=0, low=-15, high=15) + 240, mean=np.full(5, 240.0),
               w=_t.grid(5, 2), beta=1.0),
    *(_transform(f"exact-beta-{beta}", "C1", exact=True, x=_t.ternary(5, 7), mean=2 * _t.ternary(7), w=_t.ternary(7, 3),
                 beta=beta) for beta in (0.0, 0.5, 1.0, 1.5)),
    _transform("exact-one-row", "C1", exact=True, x=_t.ternary(1, 11), mean=_t.ternary(11), w=_t.ternary(11, 2),
               beta=1.0),
    _transform("exact-cancelling", "C1", exact=True, x=np.full((3, 5), 128.0) + _t.ternary(3, 5),
               mean=np.full(5, 128.0), w=_t.ternary(5, 3), beta=1.0),
    _normalize("grid", "C1", x=_n.grid(5, 7)),
    _normalize("dense", "C1", x=_n.dense(3, 5)),
    _normalize("zero-row", "C1", x=_n.grid(3, 5) * [[1], [0], [1]], only=RANGE),
    _normalize("around-the-floor", "C1", x=_n.grid(5, 3) * np.ldexp(1.0, [[-20], [-24], [-26], [-28], [-40]])),
    _normalize("far-below", "C1", x=_n.grid(2, 3) * [[1], [2.0**-60]]),
    _normalize("exact-threes", "C1", exact=True, x=np.array([[2.0, -2, 2, 2], [0, 0, -8, 0], [0.5, 0.5, 0.5, -0.5]])),
    _normalize("one-feature", "C1", x=_n.grid(3, 1) * [[1], [0], [1]], only=RANGE),
    *(_whiten(f"beta-{beta}-gamma-{g}-k-{k}", "C1", sample=_SAMPLE, x=_X, beta=beta, gamma=g, k=k)
      for beta, g, k in ((1.0, 1.0, 4), (1.0, 1.0, 2), (0.0, 0.0, 4), (0.0, 0.0, 3), (1.0, 0.0, 2), (0.5, 0.75, 4),
                         (0.25, 0.5, 3))),
    _whiten("offset", "C1", sample=_SAMPLE + 96, x=_X + 96, beta=1.0, gamma=1.0, k=4),
    _whiten("five-rows", "C1", sample=_SAMPLE[:5, :3], x=_X[:, :3], beta=1.0, gamma=1.0, k=3),
    _whiten("one-component", "C1", sample=_SAMPLE[:, :2] * [8, 1], x=_X[:, :2], beta=0.5, gamma=1.0, k=1),
    _spearman("no-ties", "C1", a=np.stack([_s.permutation(11) for _ in range(3)]) * 0.5,
              b=np.stack([_s.permutation(11) for _ in range(3)]) * 0.25),
    _spearman("ties", "C1", a=_s.grid(5, 11, low=0, high=3), b=_s.grid(5, 11)),
    _spearman("ties-on-both", "C1", a=_s.grid(3, 7, low=0, high=2), b=_s.grid(3, 7, low=0, high=1)),
    _spearman("constant", "C2", a=np.concatenate([np.ones((1, 5)), _s.grid(2, 5)]), b=_s.grid(3, 5)),
    _spearman("two-values", "C1", a=np.array([[1.0, 2], [1, 2]]), b=np.array([[5.0, 3], [3, 5]])),
    _spearman("monotone", "C1", a=np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]),
              b=np.array([[1.0, 8, 64, 512], [-1, -8, -64, -512], [2, 1, 512, 4]])),
)  # fmt: skip


# Laws.
def rows_translated(implementation: Function, case: Case) -> None:
    """Adding 4 to every row moves the mean by 4 and the scatter not at all."""
    one, two = run(implementation, case), run(implementation, case, x=case["x"] + 4)
    close("rows_translated", case, two[0].value, one[0].value + 4, one[0].radius + two[0].radius + 2.0**-50)
    close("rows_translated", case, two[1].value, one[1].value, one[1].radius + two[1].radius)


def rows_in_any_order(implementation: Function, case: Case) -> None:
    """Reversing the rows changes nothing."""
    one, two = run(implementation, case), run(implementation, case, x=case["x"][::-1].copy())
    for before, after in zip(one, two, strict=True):
        close("rows_in_any_order", case, after.value, before.value, before.radius + after.radius)


def two_rows_by_hand(implementation: Function, case: Case) -> None:
    """Rows 0 and v: mean v / 2, scatter v^T v / 2; one row alone scatters nothing."""
    d = case["x"].shape[1]
    v = np.arange(1.0, d + 1)
    more = {"sizes": (1,)} if "sizes" in case.arguments else {}
    mean, scatter = run(implementation, case, x=np.stack([0 * v, v]), **more)
    close("two_rows_by_hand", case, mean.value, v / 2, mean.radius)
    close("two_rows_by_hand", case, scatter.value, np.outer(v, v) / 2, scatter.radius)
    mean, scatter = run(implementation, case, x=v[None], **({"sizes": ()} if more else {}))
    close("two_rows_by_hand", case, mean.value, v, mean.radius)
    close("two_rows_by_hand", case, scatter.value, np.zeros((d, d)), scatter.radius)


def repeated_rows_double_the_scatter(implementation: Function, case: Case) -> None:
    """Every row twice: the same mean, twice the scatter."""
    one, two = run(implementation, case), run(implementation, case, x=np.tile(case["x"], (2, 1)))
    close("repeated_rows_double_the_scatter", case, two[0].value, one[0].value, one[0].radius + two[0].radius)
    close("repeated_rows_double_the_scatter", case, two[1].value, 2 * one[1].value, 2 * one[1].radius + two[1].radius)


def offset_leaves_the_scatter(implementation: Function, case: Case) -> None:
    """The scatter of rows far from the origin is that of the rows around it (float64 and float32)."""
    far = {"float64": 2.0**30, "float32": 2.0**11}.get(case.profile.dtype, 0.0)
    one, two = run(implementation, case), run(implementation, case, x=case["x"] + far)
    close("offset_leaves_the_scatter", case, two[1].value, one[1].value, one[1].radius + two[1].radius)


def blocks_do_not_show(implementation: Function, case: Case) -> None:
    """Row by row, in one block or as drawn: the same moments."""
    n = len(case["x"])
    drawn_, whole = run(implementation, case), run(implementation, case, sizes=())
    single = run(implementation, case, sizes=(1,) * (n - 1))
    for one, two, three in zip(drawn_, whole, single, strict=True):
        close("blocks_do_not_show", case, one.value, two.value, one.radius + two.radius)
        close("blocks_do_not_show", case, three.value, two.value, three.radius + two.radius)


def _swapped(case: Case) -> dict[str, Any]:
    return {f"{part}_{x}": case[f"{part}_{y}"] for part in ("count", "mean", "scatter") for x, y in ("ab", "ba")}


def merge_is_commutative(implementation: Function, case: Case) -> None:
    """Swapping the sides changes nothing."""
    for one, two in zip(run(implementation, case), run(implementation, case, **_swapped(case)), strict=True):
        close("merge_is_commutative", case, two.value, one.value, one.radius + two.radius)


def no_rows_are_neutral(implementation: Function, case: Case) -> None:
    """Merging nothing returns the other side; merging nothing with nothing returns zeros."""
    d = len(case["mean_a"])
    mean, scatter = run(implementation, case, **_none(d))
    close("no_rows_are_neutral", case, mean.value, case["mean_a"], mean.radius)
    close("no_rows_are_neutral", case, scatter.value, case["scatter_a"], scatter.radius)
    nothing = {"count_a": 0, "mean_a": np.zeros(d), "scatter_a": np.zeros((d, d))} | _none(d)
    for out in run(implementation, case, **nothing):
        equal("no_rows_are_neutral", case, out.value, np.zeros(out.value.shape))


def merge_of_single_rows(implementation: Function, case: Case) -> None:
    """Row 0 merged with three rows at v: mean 3 v / 4, scatter 3 v^T v / 4 (and what they had)."""
    d = len(case["mean_a"])
    v = np.arange(1.0, d + 1)
    zero = np.zeros((d, d))
    sides = {"count_a": 1, "mean_a": 0 * v, "scatter_a": zero, "count_b": 3, "mean_b": v, "scatter_b": zero + np.eye(d)}
    mean, scatter = run(implementation, case, **sides)
    close("merge_of_single_rows", case, mean.value, 0.75 * v, mean.radius)
    close("merge_of_single_rows", case, scatter.value, 0.75 * np.outer(v, v) + np.eye(d), scatter.radius)


def beta_inside_the_covariance(implementation: Function, case: Case) -> None:
    """beta = 1 gives scatter / n; without scatter, mean^T mean times (1 - beta)^2."""
    one = run(implementation, case, beta=1.0)[0]
    close("beta_inside_the_covariance", case, one.value, case["scatter"] / case["count"], one.radius + 2.0**-46)
    outer = np.outer(case["mean"], case["mean"])
    for beta in (0.0, 0.5, 3.0):
        out = run(implementation, case, scatter=0 * case["scatter"], beta=beta)[0]
        close("beta_inside_the_covariance", case, out.value, (1 - beta) ** 2 * outer, out.radius + 2.0**-46)


def spectrum_of_a_diagonal(implementation: Function, case: Case) -> None:
    """diag(2, 16, 1/2) has eigenvalues 16, 2, 1/2 on its axes."""
    values, matrix, gram = run(implementation, case, sigma=np.diag([2.0, 16.0, 0.5]))
    close("spectrum_of_a_diagonal", case, values.value, np.array([16.0, 2, 0.5]), values.radius)
    close("spectrum_of_a_diagonal", case, matrix.value, np.diag([2.0, 16.0, 0.5]), matrix.radius)
    close("spectrum_of_a_diagonal", case, gram.value, np.eye(3), gram.radius)


def spectrum_rebuilds_the_matrix(implementation: Function, case: Case) -> None:
    """U diag(values) U^T is sigma, U^T U is one, values descend."""
    values, matrix, gram = run(implementation, case)
    close("spectrum_rebuilds_the_matrix", case, matrix.value, case["sigma"], matrix.radius)
    close("spectrum_rebuilds_the_matrix", case, gram.value, np.eye(len(case["sigma"])), gram.radius)
    rise = np.maximum(np.diff(values.value), 0.0)
    close("spectrum_rebuilds_the_matrix", case, rise, 0 * rise, 2 * values.radius[1:])


def whitened_is_the_identity(implementation: Function, case: Case) -> None:
    """gamma = 1: W^T sigma W = 1; gamma = 0: W^T W = 1, seen as the trace of W W^T."""
    k = min(case["k"], len(case["sigma"]))
    one = run(implementation, case, gamma=1.0, sigma=case["sigma"] + np.eye(len(case["sigma"])), k=k)[0]
    close("whitened_is_the_identity", case, one.value, np.eye(k), one.radius)
    none = run(implementation, case, gamma=0.0)[1]
    trace = np.trace(none.value)
    close("whitened_is_the_identity", case, trace, float(case["k"]), np.trace(none.radius) + 2.0**-46)


def top_k_trace(implementation: Function, case: Case) -> None:
    """gamma = 0: the trace of W^T sigma W is the sum of the k largest eigenvalues."""
    out = run(implementation, case, gamma=0.0)[0]
    values = np.linalg.eigvalsh(case["sigma"])[::-1]
    slack = np.trace(out.radius) + 64 * 2.0**-53 * values[0]
    close("top_k_trace", case, np.trace(out.value), values[: case["k"]].sum(), slack)


def axes_keep_a_power(implementation: Function, case: Case) -> None:
    """sigma = diag(4, 64, 1), k = 2: W W^T = diag(4^-gamma, 64^-gamma, 0) on the axes that are kept."""
    for g in (0.0, 0.5, 1.0):
        whitened, kernel = run(implementation, case, sigma=np.diag([4.0, 64, 1]), gamma=g, k=2)
        close("axes_keep_a_power", case, kernel.value, np.diag([4.0**-g, 64.0**-g, 0]), kernel.radius)
        close("axes_keep_a_power", case, whitened.value, np.diag([64 ** (1 - g), 4 ** (1 - g)]), whitened.radius)


def null_components_are_zero(implementation: Function, case: Case) -> None:
    """sigma = v^T v, gamma = 1, k = d: W W^T = v^T v / |v|^4 and nothing else; v an axis, in float64 any direction."""
    # The floor is d 2^-52 of the largest eigenvalue: only float64 computes below it.
    skew = [np.array([1.0, 2.0, 2.0]), np.array([3.0, 0.0, 4.0])] if case.profile.dtype == "float64" else []
    for v in (np.array([0.0, 2.0, 0.0]), *skew):
        out = run(implementation, case, sigma=np.outer(v, v), gamma=1.0, k=3)[1]
        close("null_components_are_zero", case, out.value, np.outer(v, v) / (v @ v) ** 2, out.radius)


def transform_of_unit_rows(implementation: Function, case: Case) -> None:
    """Unit rows with beta = 0 give W; a zero row gives - beta mean W."""
    d, w = len(case["mean"]), case["w"]
    out = run(implementation, case, x=np.eye(d), beta=0.0)[0]
    close("transform_of_unit_rows", case, out.value, w, out.radius)
    for j in range(d):
        out = run(implementation, case, x=np.zeros((1, d)), mean=np.eye(d)[j], beta=0.5)[0]
        close("transform_of_unit_rows", case, out.value, -0.5 * w[j : j + 1], out.radius)


def mean_goes_to_zero(implementation: Function, case: Case) -> None:
    """The mean itself, with beta = 1, is the origin."""
    out = run(implementation, case, x=np.stack([case["mean"], 2 * case["mean"]]), beta=1.0)[0]
    close("mean_goes_to_zero", case, out.value[0], np.zeros(out.value.shape[1]), out.radius[0])


def _floor_is_lost(case: Case) -> bool:
    """float16 throughout rounds the floor of 1e-8 to zero: rows without a norm are 0/0 there."""
    return case.profile.dtype == "float16" and case.profile.name == "eager"


def rows_have_unit_norm(implementation: Function, case: Case) -> None:
    """Rows well above the floor have norm 1 and their direction; a zero row stays zero."""
    x = case["x"]
    norm = np.sqrt((x * x).sum(-1, keepdims=True))
    if not norm.all() and _floor_is_lost(case):
        return
    out = run(implementation, case)[0]
    expected = np.where(norm > 1e-6, x / np.maximum(norm, 1e-6), 0.0)
    slack = np.where((norm > 1e-6) | (norm == 0), out.radius + 2.0**-50, np.inf)
    close("rows_have_unit_norm", case, out.value, expected, slack)


def floor_of_the_norm(implementation: Function, case: Case) -> None:
    """2^-28 (3, 4) has norm 1.9e-8 and becomes (0.6, 0.8); 2^-32 (3, 4) has 1.2e-9 and is multiplied by 10^8."""
    x = np.array([[3.0, 4.0]]) * np.ldexp(1.0, [[-28], [-32]])
    out = run(implementation, case, x=x)[0]
    kept = case.with_(x=x)["x"]
    if not kept.all():
        # float16 holds nothing that small.
        return
    close("floor_of_the_norm", case, out.value, np.array([[0.6, 0.8], kept[1] / 1e-8]), out.radius + 2.0**-50)


def _cosines(implementation: Function, case: Case, **changes: Any):
    return run(implementation, case, **changes)[0]


def _same(name: str, case: Case, one: Any, two: Any) -> None:
    close(name, case, two.value, one.value, one.radius + two.radius)


def cosines_translated(implementation: Function, case: Case) -> None:
    """beta = 1: shifting the sample and the rows together changes no cosine."""
    moved = {"sample": case["sample"] + 4, "x": case["x"] + 4}
    one, two = _cosines(implementation, case, beta=1.0), _cosines(implementation, case, beta=1.0, **moved)
    _same("cosines_translated", case, one, two)


def cosines_have_no_scale(implementation: Function, case: Case) -> None:
    """A common scale of the sample and the rows changes no cosine."""
    _same("cosines_have_no_scale", case, _cosines(implementation, case),
          _cosines(implementation, case, sample=4 * case["sample"], x=4 * case["x"]))  # fmt: skip


def sample_repeated(implementation: Function, case: Case) -> None:
    """Every sample row twice: the same covariance, the same cosines."""
    _same("sample_repeated", case, _cosines(implementation, case),
          _cosines(implementation, case, sample=np.tile(case["sample"], (2, 1))))  # fmt: skip


def full_whitening_sees_no_linear_map(implementation: Function, case: Case) -> None:
    """(1, 1, d): stretching or swapping features changes no cosine."""
    d = case["x"].shape[1]
    full = {"beta": 1.0, "gamma": 1.0, "k": d}
    stretch = np.ldexp(1.0, np.arange(d) % 2)
    one = _cosines(implementation, case, **full)
    two = _cosines(implementation, case, sample=(case["sample"] * stretch)[:, ::-1].copy(),
                   x=(case["x"] * stretch)[:, ::-1].copy(), **full)  # fmt: skip
    _same("full_whitening_sees_no_linear_map", case, one, two)


def rotation_is_the_identity(implementation: Function, case: Case) -> None:
    """(0, 0, d): the cosines of the rows themselves."""
    x = case["x"]
    out = _cosines(implementation, case, beta=0.0, gamma=0.0, k=x.shape[1])
    norm = np.sqrt((x * x).sum(-1))
    if not norm.all() and _floor_is_lost(case):
        return
    with np.errstate(invalid="ignore"):
        expected = x @ x.T / np.outer(norm, norm)
    slack = np.where(np.outer(norm, norm) > 0, out.radius + 2.0**-48, np.inf)
    close("rotation_is_the_identity", case, out.value, np.nan_to_num(expected), slack)


def axes_of_a_cross(implementation: Function, case: Case) -> None:
    """Sample +-4 e1, +-2 e2, +-e3 around c: (1, 1, 2) of c + (4, 2, 5) and c + (4, -2, -7) are at right angles."""
    cross = np.concatenate([np.diag([4.0, 2, 1]), -np.diag([4.0, 2, 1])])
    c = np.array([8.0, 0.0, -4.0])
    x = c + np.array([[4.0, 2, 5], [4, -2, -7], [8, 2, 0]])
    out = _cosines(implementation, case, sample=cross + c, x=x, beta=1.0, gamma=1.0, k=2)
    root = np.sqrt(10)
    expected = np.array([[1, 0, 3 / root], [0, 1, 1 / root], [3 / root, 1 / root, 1]])
    close("axes_of_a_cross", case, out.value, expected, out.radius + 2.0**-50)
    # Half of the scale taken out: (4, 2) becomes (4 / 4^(1/2), 2 / 2^(1/2)) = (2, 2^(1/2)).
    out = _cosines(implementation, case, sample=cross + c, x=x, beta=1.0, gamma=0.5, k=2)
    close("axes_of_a_cross", case, out.value[0, 1], 1 / 3, out.radius[0, 1] + 2.0**-50)
    # beta = 1/2: the mean (0, 0, 8) adds 16 to the third variance, which leads then; rows are shifted by (0, 0, 4).
    c = np.array([0.0, 0.0, 8.0])
    out = _cosines(implementation, case, sample=cross + c, x=x - [8, 0, -4] + c, beta=0.5, gamma=0.0, k=2)
    rows = np.array([[4.0, 9], [4, -3], [8, 4]])
    rows /= np.sqrt((rows**2).sum(1, keepdims=True))
    close("axes_of_a_cross", case, out.value, rows @ rows.T, out.radius + 2.0**-50)


def correlation_sees_only_order(implementation: Function, case: Case) -> None:
    """Doubling b changes nothing, negating it changes the sign, swapping a and b nothing."""
    one = run(implementation, case)[0]
    for changes, sign in (({"b": 2 * case["b"]}, 1), ({"b": -case["b"]}, -1), ({"a": case["b"], "b": case["a"]}, 1)):
        two = run(implementation, case, **changes)[0]
        close("correlation_sees_only_order", case, sign * two.value, one.value, one.radius + two.radius)


def correlation_by_hand(implementation: Function, case: Case) -> None:
    """(1, 1, 1, 2, 3) with 1..5: 8 / 80^(1/2); opposite orders: -1; a constant: NaN; two neighbours swapped: 0.9."""
    a = np.array([[1.0, 1, 1, 2, 3], [1, 8, 64, 128, 256], [1, 1, 1, 1, 1], [1, 2, 3, 4, 5]])
    b = np.array([[1.0, 2, 3, 4, 5], [5, 4, 3, 2, 1], [1, 2, 3, 4, 5], [1, 3, 2, 4, 5]])
    out = run(implementation, case, a=a, b=b)[0]
    expected = np.array([8 / np.sqrt(80), -1, np.nan, 0.9])
    slack = np.where(np.isnan(expected), 0.0, out.radius + 2.0**-50)
    close("correlation_by_hand", case, out.value, expected, slack)


_MOMENTS = ("whitening.moments", "whitening.moments_streamed")
_PROJECTIONS = ("whitening.projection", "whitening.projection_null_zero")
LAWS = (
    Law(rows_translated, _MOMENTS, ("C1",)),
    Law(rows_in_any_order, _MOMENTS, ("C1",)),
    Law(two_rows_by_hand, _MOMENTS, ("C2",)),
    Law(repeated_rows_double_the_scatter, _MOMENTS),
    Law(offset_leaves_the_scatter, _MOMENTS, ("C1",)),
    Law(blocks_do_not_show, ("whitening.moments_streamed",), ("C1", "C2")),
    Law(merge_is_commutative, ("whitening.merge",), ("C1",)),
    Law(no_rows_are_neutral, ("whitening.merge",), ("C1",)),
    Law(merge_of_single_rows, ("whitening.merge",)),
    Law(beta_inside_the_covariance, ("whitening.covariance",), ("C1", "C2")),
    Law(spectrum_of_a_diagonal, ("whitening.spectrum",), ("C1",)),
    Law(spectrum_rebuilds_the_matrix, ("whitening.spectrum",), ("C1",)),
    Law(whitened_is_the_identity, _PROJECTIONS, ("C1",)),
    Law(top_k_trace, _PROJECTIONS[:1], ("C2",)),
    Law(top_k_trace, _PROJECTIONS[1:]),
    Law(axes_keep_a_power, _PROJECTIONS, ("C1",)),
    Law(null_components_are_zero, _PROJECTIONS[1:], ("C1",)),
    Law(transform_of_unit_rows, ("whitening.transform",), ("C1",)),
    Law(mean_goes_to_zero, ("whitening.transform",), ("C1",)),
    Law(rows_have_unit_norm, ("whitening.normalize",), ("C1",)),
    Law(floor_of_the_norm, ("whitening.normalize",), ("C1",)),
    Law(cosines_translated, ("whitening.whiten",), ("C1",)),
    Law(cosines_have_no_scale, ("whitening.whiten",), ("C1",)),
    Law(sample_repeated, ("whitening.whiten",)),
    Law(full_whitening_sees_no_linear_map, ("whitening.whiten",)),
    Law(rotation_is_the_identity, ("whitening.whiten",)),
    Law(axes_of_a_cross, ("whitening.whiten",), ("C1",)),
    Law(correlation_sees_only_order, ("whitening.spearman",), ("C1",)),
    Law(correlation_by_hand, ("whitening.spearman",), ("C1", "C2")),
)


def _spread_rows(draw: Draw, n: int, d: int) -> np.ndarray:
    return draw.grid(n, d, low=-7, high=7, exponent=-1)


def strategy(function: str, profile: Profile) -> st.SearchStrategy[Case]:
    """Few rows of four-bit numbers in one to four dimensions; samples always span them."""
    op = f"whitening.{function}"
    n, d, beta = st.integers(1, 7), st.integers(1, 4), st.sampled_from([0.0, 0.5, 1.0])
    gammas = st.sampled_from([0.0, 0.5, 1.0])
    if function == "moments":
        return drawn(op, profile, lambda draw, n, d: {"x": _spread_rows(draw, n, d)}, n=n, d=d)
    if function == "moments_streamed":

        def cut(draw: Draw, n: int, d: int, sizes: list[int]) -> dict:
            kept = [s for i, s in enumerate(sizes) if sum(sizes[: i + 1]) <= n]
            return {"x": _spread_rows(draw, n, d), "sizes": tuple(kept)}

        return drawn(op, profile, cut, n=n, d=d, sizes=st.lists(st.integers(0, 3), max_size=4))
    if function == "merge":

        def sides(draw: Draw, d: int, count_a: int, count_b: int) -> dict:
            made: dict[str, Any] = {}
            for name, count in (("a", count_a), ("b", count_b)):
                rows = _spread_rows(draw, 2, d)
                made |= {f"count_{name}": count, f"mean_{name}": draw.grid(d), f"scatter_{name}": rows.T @ rows}
            return made

        return drawn(op, profile, sides, d=d, count_a=st.integers(1, 9), count_b=st.integers(1, 9))
    if function == "covariance":

        def gathered(draw: Draw, d: int, count: int, beta: float) -> dict:
            rows = _spread_rows(draw, 2, d)
            return {"count": count, "mean": draw.grid(d), "scatter": rows.T @ rows, "beta": beta}

        return drawn(op, profile, gathered, d=d, count=st.integers(1, 9), beta=beta)
    if function in ("spectrum", "projection", "projection_null_zero"):

        def symmetric(draw: Draw, d: int, **rest: Any) -> dict:
            rows = draw.grid(d + 3, d, low=-3, high=3, exponent=0)
            return {"sigma": rows.T @ rows + np.eye(d), **{k: min(v, d) if k == "k" else v for k, v in rest.items()}}

        if function == "spectrum":
            return drawn(op, profile, symmetric, d=st.integers(2, 4))
        return drawn(op, profile, symmetric, d=d, gamma=gammas, k=st.integers(1, 4))
    if function == "transform":

        def mapped(draw: Draw, n: int, d: int, k: int, beta: float) -> dict:
            return {"x": draw.grid(n, d), "mean": draw.grid(d), "w": draw.grid(d, k), "beta": beta}

        return drawn(op, profile, mapped, n=n, d=d, k=st.integers(1, 3), beta=beta)
    if function == "normalize":

        def scaled(draw: Draw, n: int, d: int, exponent: int, zero: bool) -> dict:
            return {"x": draw.grid(n, d, exponent=exponent) * np.where(np.arange(n) == 0, 1 - zero, 1)[:, None]}

        return drawn(op, profile, scaled, n=n, d=d, exponent=st.sampled_from([-6, -12]), zero=st.booleans())
    if function == "spearman":

        def pairs(draw: Draw, n: int, high: int) -> dict:
            return {"a": draw.grid(2, n, low=0, high=high), "b": draw.grid(2, n, low=0, high=7)}

        return drawn(op, profile, pairs, n=st.integers(2, 9), high=st.sampled_from([2, 127]))

    def sampled(draw: Draw, n: int, d: int, beta: float, gamma: float, k: int) -> dict:
        sample = np.concatenate([_spread_rows(draw, n, d), 2 * np.eye(d), -3 * np.eye(d)])
        return {"sample": sample, "x": _spread_rows(draw, 3, d), "beta": beta, "gamma": gamma, "k": min(k, d)}

    return drawn(op, profile, sampled, n=n, d=d, beta=beta, gamma=gammas, k=st.integers(1, 4))


# Mutants.
def _flat(function):
    """A mutant of the moments of rows as one of the stream, whatever the blocks."""
    return lambda x, sizes: function(x)


def _raw(x, dtype=np.float64):
    x = x.astype(dtype)
    n = dtype(len(x))
    mean = x.sum(0, dtype=dtype) / n
    return mean, x.T @ x - n * np.outer(mean, mean)


def _streamed_with(x, sizes, *, weight=None, last=False, drop=False, unweighted=False):
    count, mean, scatter = 0, np.zeros(x.shape[1]), np.zeros((x.shape[1],) * 2)
    blocks = [b for b in np.split(x, np.cumsum(sizes)) if len(b)]
    for block in blocks[:-1] if drop and len(blocks) > 1 else blocks:
        b = block.mean(0)
        centred = block - b
        n = count + len(block)
        delta = b - mean if count else b * 0
        factor = {None: count * len(block) / n, "none": 0.0, "b": len(block)}[weight]
        scatter = scatter + centred.T @ centred + np.outer(delta, delta) * factor
        mean = b if last or not count else (mean + b) / 2 if unweighted else mean + delta * len(block) / n
        count = n
    return mean, scatter


def _merge_with(count_a, mean_a, scatter_a, count_b, mean_b, scatter_b, *, cross=None, half=False, add=True):
    n = max(count_a + count_b, 1)
    delta = mean_b - mean_a
    factor = count_a * count_b / n if cross is None else cross(count_a, count_b, n)
    mean = (mean_a + mean_b) / 2 if half else mean_a + delta * count_b / n
    return mean, scatter_a + (scatter_b if add else 0) + np.outer(delta, delta) * factor


def _project(
    sigma, gamma, k, *, power=0.5, ascending=False, floor=True, transpose=False, rows=False, flip=False, add=0.0
):
    values, vectors = np.linalg.eigh(sigma)
    if not ascending:
        values, vectors = values[::-1], vectors[:, ::-1]
    null = _null(values) if floor and gamma > 0 else np.zeros(len(values), bool)
    powers = np.where(
        null, 0.0, (np.where(null, 1.0, np.maximum(values, 1e-20)) + add) ** (-gamma * power * (-1 if flip else 1))
    )
    if rows:
        vectors = vectors.T
    w = vectors * powers
    return (w @ vectors.T if transpose else w)[:, :k]


def _whiten_with(
    sample, x, beta, gamma, k, *, inside=None, outside=None, ddof=0, fit_x=False, unit=True, raw=False, **more
):
    fit = x if fit_x else sample
    m = fit.mean(0)
    inner, outer = beta if inside is None else inside, beta if outside is None else outside
    centred = fit - inner * m
    sigma = centred.T @ centred / (len(fit) - ddof)
    if raw:
        sigma = np.corrcoef((fit - m).T).reshape(len(m), len(m))
    y = (x - outer * m) @ _project(sigma, gamma, k, **more)
    return y / np.maximum(np.sqrt((y * y).sum(-1, keepdims=True)), 1e-8) if unit else y


def _ranks_by_order(v):
    return np.argsort(np.argsort(v, -1, kind="stable"), -1, kind="stable").astype(float)


def _correlate(a, b, ranks=None, nan=True):
    a, b = (ranks(v) if ranks else v for v in (a, b))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    spread = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    value = (a * b).sum(-1) / spread
    return value if nan else np.where(spread == 0, 0.0, value)


def _dense_ranks(v):
    return np.stack([np.unique(row, return_inverse=True)[1] for row in v]).astype(float)


def _kendall(a, b):
    one, two = (np.sign(v[..., :, None] - v[..., None, :]) for v in (a, b))
    return (one * two).sum((-1, -2)) / np.sqrt((one**2).sum((-1, -2)) * (two**2).sum((-1, -2)))


def _of_moments(bug: str, call: Function) -> tuple[Mutant, Mutant]:
    return Mutant("whitening.moments", bug, call), Mutant("whitening.moments_streamed", bug, _flat(call))


def _of_projections(bug: str, call: Function) -> tuple[Mutant, Mutant]:
    return Mutant("whitening.projection", bug, call), Mutant("whitening.projection_null_zero", bug, call)


MUTANTS = (
    *_of_moments("divided by n: a covariance", lambda x: (x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)) / len(x))),
    *_of_moments("not centred", lambda x: (x.mean(0), x.T @ x)),
    *_of_moments("mean over n - 1", lambda x: (x.sum(0) / max(len(x) - 1, 1), (x - x.mean(0)).T @ (x - x.mean(0)))),
    *_of_moments("only the variances", lambda x: (x.mean(0), np.diag(((x - x.mean(0)) ** 2).sum(0)))),
    *_of_moments("the last row is left out", lambda x: _moments(x[:-1] if len(x) > 1 else x)),
    Mutant("whitening.moments_streamed", "means of blocks are not merged into the scatter",
           partial(_streamed_with, weight="none")),
    Mutant("whitening.moments_streamed", "the merge weighs with n_b instead of n_a n_b / n",
           partial(_streamed_with, weight="b")),
    Mutant("whitening.moments_streamed", "the mean of the last block", partial(_streamed_with, last=True)),
    Mutant("whitening.moments_streamed", "the last block is dropped", partial(_streamed_with, drop=True)),
    Mutant("whitening.moments_streamed", "blocks weigh the same, whatever their rows",
           partial(_streamed_with, unweighted=True)),
    Mutant("whitening.merge", "no cross term", partial(_merge_with, cross=lambda a, b, n: 0.0)),
    Mutant("whitening.merge", "cross term n_b", partial(_merge_with, cross=lambda a, b, n: b)),
    Mutant("whitening.merge", "cross term n_a n_b", partial(_merge_with, cross=lambda a, b, n: a * b)),
    Mutant("whitening.merge", "means averaged without counts", partial(_merge_with, half=True)),
    Mutant("whitening.merge", "the second scatter is dropped", partial(_merge_with, add=False)),
    Mutant("whitening.covariance", "beta is ignored", lambda count, mean, scatter, beta: scatter / count),
    Mutant("whitening.covariance", "divided by n - 1", lambda count, mean, scatter, beta:
           scatter / max(count - 1, 1) + (1 - beta) ** 2 * np.outer(mean, mean)),
    Mutant("whitening.covariance", "1 - beta not squared", lambda count, mean, scatter, beta:
           scatter / count + (1 - beta) * np.outer(mean, mean)),
    Mutant("whitening.covariance", "1 - beta^2", lambda count, mean, scatter, beta:
           scatter / count + (1 - beta**2) * np.outer(mean, mean)),
    Mutant("whitening.covariance", "beta instead of 1 - beta", lambda count, mean, scatter, beta:
           scatter / count + beta**2 * np.outer(mean, mean)),
    Mutant("whitening.spectrum", "ascending", lambda sigma: np.linalg.eigh(sigma)),
    Mutant("whitening.spectrum", "vectors not reversed with their values", lambda sigma:
           (np.linalg.eigh(sigma)[0][::-1], np.linalg.eigh(sigma)[1])),
    Mutant("whitening.spectrum", "vectors as rows", lambda sigma:
           (np.linalg.eigh(sigma)[0][::-1], np.linalg.eigh(sigma)[1][:, ::-1].T)),
    Mutant("whitening.spectrum", "square roots of the values", lambda sigma:
           (np.sqrt(np.abs(np.linalg.eigh(sigma)[0][::-1])), np.linalg.eigh(sigma)[1][:, ::-1])),
    *_of_projections("the smallest eigenvalues are kept", partial(_project, ascending=True)),
    *_of_projections("eigenvectors as rows", partial(_project, rows=True)),
    *_of_projections("multiplied by the power instead of divided", partial(_project, flip=True)),
    *_of_projections("gamma is ignored", lambda sigma, gamma, k: _project(sigma, 1.0, k)),
    *_of_projections("no scaling at all", lambda sigma, gamma, k: _project(sigma, 0.0, k)),
    *_of_projections("symmetric square root, truncated", partial(_project, transpose=True)),
    *_of_projections("1e-3 is added to the eigenvalues", partial(_project, add=1e-3)),
    Mutant("whitening.transform", "beta is ignored", lambda x, mean, w, beta: (x - mean) @ w),
    Mutant("whitening.transform", "not centred", lambda x, mean, w, beta: x @ w),
    Mutant("whitening.transform", "the mean is added", lambda x, mean, w, beta: (x + beta * mean) @ w),
    Mutant("whitening.transform", "1 - beta", lambda x, mean, w, beta: (x - (1 - beta) * mean) @ w),
    Mutant("whitening.normalize", "1e-8 is added to the norm", lambda x:
           x / (np.sqrt((x * x).sum(-1, keepdims=True)) + 1e-8)),
    Mutant("whitening.normalize", "floor 1e-12", lambda x:
           x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), 1e-12)),
    Mutant("whitening.normalize", "no floor", lambda x: x / np.sqrt((x * x).sum(-1, keepdims=True))),
    Mutant("whitening.normalize", "the floor under the square of the norm", lambda x:
           x / np.sqrt(np.maximum((x * x).sum(-1, keepdims=True), 1e-8))),
    Mutant("whitening.normalize", "sum of magnitudes", lambda x:
           x / np.maximum(np.abs(x).sum(-1, keepdims=True), 1e-8)),
    Mutant("whitening.whiten", "beta outside the covariance only", partial(_whiten_with, inside=1.0)),
    Mutant("whitening.whiten", "beta inside the covariance only", partial(_whiten_with, outside=1.0)),
    Mutant("whitening.whiten", "fitted on the rows themselves", partial(_whiten_with, fit_x=True)),
    Mutant("whitening.whiten", "not normalised", partial(_whiten_with, unit=False)),
    Mutant("whitening.whiten", "the smallest eigenvalues are kept", partial(_whiten_with, ascending=True)),
    Mutant("whitening.whiten", "eigenvectors as rows", partial(_whiten_with, rows=True)),
    Mutant("whitening.whiten", "correlations instead of covariances", partial(_whiten_with, raw=True)),
    Mutant("whitening.spearman", "ties by order of appearance", partial(_correlate, ranks=_ranks_by_order)),
    Mutant("whitening.spearman", "Pearson's correlation of the values", _correlate),
    Mutant("whitening.spearman", "dense ranks", partial(_correlate, ranks=_dense_ranks)),
    Mutant("whitening.spearman", "Kendall's tau", _kendall),
    Mutant("whitening.spearman", "0 for a constant", partial(_correlate, ranks=lambda v: _ranks(v) * 1.0, nan=False)),
)  # fmt: skip


def _cov_of_one(x):
    with np.errstate(all="ignore"):
        centred = x - x.mean(0)
        return x.mean(0), centred.T @ centred / np.float64(len(x) - 1) * (len(x) - 1)


MUSEUM = (
    Mutant("whitening.moments_streamed", "raw moments in float32", _flat(partial(_raw, dtype=np.float32)),
           "https://github.com/bojone/BERT-whitening/issues/1"),
    Mutant("whitening.moments", "NaN for a single vector (n - 1 = 0)", _cov_of_one,
           "https://github.com/bojone/BERT-whitening/issues/5"),
    Mutant("whitening.projection_null_zero", "no floor: null components decide", partial(_project, floor=False),
           "https://github.com/scikit-learn/scikit-learn/pull/34866"),
    *(Mutant(op, "eigenvalues to the power -gamma instead of -gamma / 2", partial(_project, power=1.0),
             "https://github.com/facebookresearch/faiss/issues/559") for op in _PROJECTIONS),
    Mutant("whitening.whiten", "eigenvalues to the power -gamma instead of -gamma / 2",
           partial(_whiten_with, power=1.0), "https://github.com/facebookresearch/faiss/issues/559"),
)  # fmt: skip
