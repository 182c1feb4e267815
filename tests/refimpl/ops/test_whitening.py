"""Whitening: moments in any order, the two softnesses, rank, and what cosines must not see."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from refimpl.check import DomainError, ShapeError
from refimpl.ops import whitening
from refimpl.ops.whitening import Moments


def exact_moments(x):
    """Mean and scatter in integers: x holds multiples of 2^-30."""
    whole = np.array([[int(v) for v in row] for row in np.ldexp(x, 30)], dtype=object)
    n = len(x)
    total = whole.sum(axis=0)
    scatter = n * (whole.T @ whole) - np.outer(total, total)
    mean = np.array([v / (n << 30) for v in total])
    return mean, np.array([[v / (n << 60) for v in row] for row in scatter])


def ill_centred(seed, n, d, mean=1e4):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) * 1e-2
    return np.ldexp(np.rint(np.ldexp(mean + mixed, 30)), -30)


def merged(shards):
    total = whitening.moments(shards[0][:0])
    for shard in shards:
        total = whitening.merge(total, whitening.moments(shard))
    return total


def relative(a, b):
    return abs(a - b).max() / abs(b).max()


def well(seed=0, n=97, d=5):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)


# Moments.
def test_moments_by_hand():
    m = whitening.moments(np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]]))
    assert m.count == 3
    np.testing.assert_array_equal(m.mean, [3, 4])
    np.testing.assert_array_equal(m.scatter, [[8, 12], [12, 24]])


def test_moments_of_one_row_and_of_none():
    one = whitening.moments(np.array([[3, -2, 7]]))
    np.testing.assert_array_equal(one.mean, [3, -2, 7])
    np.testing.assert_array_equal(one.scatter, np.zeros((3, 3)))
    none = whitening.moments(np.zeros((0, 3)))
    assert none.count == 0
    for m in (whitening.merge(none, one), whitening.merge(one, none)):
        assert m.count == 1
        np.testing.assert_array_equal(m.mean, one.mean)
        np.testing.assert_array_equal(m.scatter, one.scatter)
    both = whitening.merge(none, none)
    assert both.count == 0 and not both.scatter.any()


def test_the_mean_is_good_to_one_rounding():
    # Ten times 0.1 sums to less than 1: the residual gives the last bit back, and nothing scatters.
    m = whitening.moments(np.full((10, 2), 0.1))
    np.testing.assert_array_equal(m.mean, [0.1, 0.1])
    np.testing.assert_array_equal(m.scatter, np.zeros((2, 2)))


def test_merge_by_hand():
    a, b = whitening.moments(np.array([[0.0], [2.0]])), whitening.moments(np.array([[7.0]]))
    m = whitening.merge(a, b)
    # Mean 3; squares 9 + 1 + 16.
    assert (m.count, m.mean[0], m.scatter[0, 0]) == (3, 3.0, 26.0)


@pytest.mark.parametrize("order", ["as it comes", "reversed", "sorted by value", "single rows", "uneven"])
def test_shards_of_ill_centred_data_in_any_order(order):
    x = ill_centred(1, 4001, 7)
    mean, scatter = exact_moments(x)
    if order == "sorted by value":
        x = x[np.argsort(x[:, 0])]
    cuts = np.arange(1, 4001) if order == "single rows" else np.arange(37, 4001, 97)
    if order == "uneven":
        cuts = np.array([1, 2, 5, 3000, 3001, 3999])
    shards = np.split(x, cuts)
    if order == "reversed":
        shards = shards[::-1]
    for m in (whitening.moments(x), merged(shards), whitening.moments_streamed(shards)):
        assert m.count == 4001
        assert relative(m.mean, mean) < 1e-14
        assert relative(m.scatter, scatter) < 1e-10


@pytest.mark.parametrize("rows", [1, 3, 512])
def test_stream_with_drift_and_any_block_size(rows, monkeypatch):
    monkeypatch.setattr(whitening, "BLOCK_ROWS", rows)
    x = np.concatenate([ill_centred(2, 2, 5, 0.0), ill_centred(3, 700, 5), ill_centred(4, 301, 5, -3.0)])
    mean, scatter = exact_moments(x)
    m = whitening.moments_streamed(block for block in (x[:1], x[1:1], x[1:600], x[600:]))
    assert m.count == len(x)
    assert relative(m.mean, mean) < 1e-13
    assert relative(m.scatter, scatter) < 1e-12
    np.testing.assert_array_equal(m.scatter, m.scatter.T)


def test_stream_takes_float32_and_leaves_its_blocks_alone():
    x = well(3, 600, 3).astype(np.float32)
    before = x.copy()
    m = whitening.moments_streamed([x])
    np.testing.assert_array_equal(x, before)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(m.scatter / 600, np.cov(wide.T, bias=True), rtol=1e-12)
    np.testing.assert_allclose(m.mean, wide.mean(0), rtol=1e-12)


@given(st.integers(0, 2**32), st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_merge_is_commutative_and_associative(seed, sizes):
    rng = np.random.default_rng(seed)
    shards = [rng.standard_normal((n, 3)) + 5 for n in sizes]
    whole = whitening.moments(np.concatenate(shards))
    for order in (shards, shards[::-1]):
        m = merged(order)
        assert m.count == whole.count
        np.testing.assert_allclose(m.mean, whole.mean, atol=1e-13)
        np.testing.assert_allclose(m.scatter, whole.scatter, atol=1e-12)


# Covariance, spectrum, projection.
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 1.7])
def test_beta_acts_inside_the_covariance(beta):
    x = well(4)
    shifted = x - beta * x.mean(0)
    expected = shifted.T @ shifted / len(x)
    np.testing.assert_allclose(whitening.covariance(whitening.moments(x), beta=beta), expected, rtol=1e-12, atol=1e-13)


def test_spectrum_descends_with_fixed_signs():
    sigma = np.array([[2.0, 1.0], [1.0, 2.0]])
    values, vectors = whitening.spectrum(sigma)
    np.testing.assert_allclose(values, [3, 1], rtol=1e-15)
    np.testing.assert_allclose(vectors[:, 0], [math.sqrt(0.5)] * 2, rtol=1e-15)
    sigma = np.cov(well(5).T)
    values, vectors = whitening.spectrum(sigma)
    assert (np.diff(values) < 0).all()
    assert (vectors[abs(vectors).argmax(axis=0), range(5)] > 0).all()
    np.testing.assert_allclose(vectors * values @ vectors.T, sigma, atol=1e-13)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(5), atol=1e-13)


def test_projection_by_hand():
    sigma = np.diag([4.0, 16.0, 1.0])
    np.testing.assert_allclose(whitening.projection(sigma, gamma=1.0, k=2), [[0, 0.5], [0.25, 0], [0, 0]])
    np.testing.assert_allclose(whitening.projection(sigma, gamma=0.5, k=3), [[0, 0.5**0.5, 0], [0.5, 0, 0], [0, 0, 1]])
    np.testing.assert_allclose(whitening.projection(sigma, gamma=0.0, k=1), [[0], [1], [0]])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_whitened_second_moment_is_the_identity_for_every_beta(beta):
    x = well(6)
    m = whitening.moments(x)
    sigma = whitening.covariance(m, beta=beta)
    w = whitening.projection(sigma, gamma=1.0, k=3)
    y = whitening.transform(x, m.mean, w, beta=beta)
    np.testing.assert_allclose(y.T @ y / len(x), np.eye(3), atol=1e-12)
    np.testing.assert_allclose(w.T @ sigma @ w, np.eye(3), atol=1e-12)


def test_soft_whitening_leaves_a_power_of_the_spectrum():
    x = well(7)
    m = whitening.moments(x)
    values = whitening.spectrum(whitening.covariance(m, beta=1.0)).values
    w = whitening.projection(whitening.covariance(m, beta=1.0), gamma=0.25, k=5)
    y = whitening.transform(x, m.mean, w, beta=1.0)
    np.testing.assert_allclose(np.linalg.eigvalsh(np.cov(y.T, bias=True))[::-1], values**0.75, rtol=1e-11)


def test_rotation_keeps_every_inner_product():
    x = well(8)
    np.testing.assert_allclose(
        whitening.transform(x, x.mean(0), whitening.projection(np.cov(x.T), gamma=0.0, k=5), beta=0.0)
        @ whitening.transform(x, x.mean(0), whitening.projection(np.cov(x.T), gamma=0.0, k=5), beta=0.0).T,
        x @ x.T,
        atol=1e-12,
    )
    y, z = whitening.whiten(x, x, beta=0.0, gamma=0.0, k=5), whitening.normalize(x)
    np.testing.assert_allclose(y @ y.T, z @ z.T, atol=1e-12)


def test_cosines_do_not_see_scale_shift_or_the_divisor():
    x, fit = well(9, 11), well(10)
    for beta, gamma in ((1.0, 1.0), (1.0, 0.0), (0.5, 0.7)):
        y = whitening.whiten(fit, x, beta=beta, gamma=gamma, k=3)
        z = whitening.whiten(fit * 8, x * 8, beta=beta, gamma=gamma, k=3)
        np.testing.assert_allclose(z @ z.T, y @ y.T, atol=1e-12)
        if beta == 1.0:
            z = whitening.whiten(fit + 100, x + 100, beta=beta, gamma=gamma, k=3)
            np.testing.assert_allclose(z @ z.T, y @ y.T, atol=1e-10)
    # n or n - 1.
    w = whitening.projection(np.cov(fit.T), gamma=1.0, k=3)
    z = whitening.normalize((x - fit.mean(0)) @ w)
    y = whitening.whiten(fit, x, beta=1.0, gamma=1.0, k=3)
    np.testing.assert_allclose(z @ z.T, y @ y.T, atol=1e-11)


# Degenerate data.
def test_fewer_rows_than_features():
    rng = np.random.default_rng(11)
    mix = rng.standard_normal((40, 40)) / 6
    fit, held_out = rng.standard_normal((30, 40)) @ mix, rng.standard_normal((50, 40)) @ mix
    m = whitening.moments(fit)
    sigma = whitening.covariance(m, beta=1.0)
    rank = whitening.rank(whitening.spectrum(sigma).values)
    assert rank == 29
    with pytest.raises(DomainError, match="whitening.projection: expected k <= rank .* received k=30, rank=29"):
        whitening.projection(sigma, gamma=1.0, k=30)
    # Without variance to divide by, gamma = 0 is safe for every k.
    assert np.isfinite(whitening.projection(sigma, gamma=0.0, k=40)).all()
    w = whitening.projection_null_zero(sigma, gamma=1.0, k=40)
    np.testing.assert_array_equal(w[:, 29:], 0)
    np.testing.assert_allclose(w[:, :29], whitening.projection(sigma, gamma=1.0, k=29))
    assert abs(whitening.transform(held_out, m.mean, w, beta=1.0)).max() < 50
    np.testing.assert_array_equal(
        whitening.projection_null_zero(sigma, gamma=0.0, k=40), whitening.projection(sigma, gamma=0.0, k=40)
    )


def test_duplicated_feature_and_constant_data():
    x = well(12, 50, 4)
    x = np.concatenate([x, x[:, :1]], axis=1)
    sigma = whitening.covariance(whitening.moments(x), beta=1.0)
    assert whitening.rank(whitening.spectrum(sigma).values) == 4
    constant = np.full((6, 3), 2.5)
    sigma = whitening.covariance(whitening.moments(constant), beta=1.0)
    np.testing.assert_array_equal(sigma, np.zeros((3, 3)))
    assert whitening.rank(np.zeros(3)) == 0
    np.testing.assert_array_equal(whitening.projection_null_zero(sigma, gamma=1.0, k=2), np.zeros((3, 2)))
    with pytest.raises(DomainError, match="k=1, rank=0"):
        whitening.projection(sigma, gamma=0.5, k=1)
    # beta < 1 keeps the direction of the mean.
    np.testing.assert_allclose(
        whitening.whiten(constant, constant, beta=0.0, gamma=1.0, k=1), np.ones((6, 1)), rtol=1e-14
    )
    y = whitening.whiten(constant, constant, beta=1.0, gamma=0.0, k=3)
    np.testing.assert_array_equal(y, np.zeros((6, 3)))


def test_rank_floor_is_width_times_the_spacing_of_one():
    floor = 4 * 2.0**-52
    assert whitening.rank(np.array([1.0, 2 * floor, floor, -1e-18])) == 2
    assert whitening.rank(np.array([8.0, 9 * floor, 8 * floor, 0.0])) == 2


def test_normalize_clips_the_norm():
    x = np.array([[3.0, 4.0], [0.0, 0.0], [3e-9, 4e-9], [3e-8, 4e-8]])
    np.testing.assert_allclose(whitening.normalize(x), [[0.6, 0.8], [0, 0], [0.3, 0.4], [0.6, 0.8]], rtol=1e-15)


# Score and search.
def test_spearman_against_scipy_and_by_hand():
    assert whitening.spearman(np.array([1.0, 2, 3]), np.array([10.0, 30, 20])) == pytest.approx(0.5, abs=1e-15)
    # Ties: ranks 0, 1.5, 1.5, 3.
    assert whitening.spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 4])) == pytest.approx(
        4.5 / math.sqrt(4.5 * 5), abs=1e-15
    )
    rng = np.random.default_rng(13)
    a, b = rng.integers(0, 5, 60).astype(float), rng.standard_normal(60)
    assert whitening.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-14)
    assert whitening.spearman(b, b) == pytest.approx(1.0) and whitening.spearman(b, -b) == pytest.approx(-1.0)
    assert math.isnan(whitening.spearman(np.ones(4), np.arange(4.0)))
    rows = whitening.spearman(np.stack([b, b]), np.stack([b, -b]))
    np.testing.assert_allclose(rows, [1, -1], rtol=1e-14)


@pytest.mark.parametrize("ks", [[0], [3, 0], [-1, 2]])
def test_search_refuses_a_k_that_keeps_nothing(ks):
    m = whitening.moments(well(14))
    with pytest.raises(DomainError, match="every k >= 1"):
        whitening.search(m, lambda encode: 1.0, betas=[1.0], gammas=[1.0], ks=ks)


def test_search_scores_the_whole_grid_and_keeps_the_first_best():
    x = well(14)
    m = whitening.moments(x)
    seen = []

    def score(encode):
        y = encode(x[:7])
        np.testing.assert_allclose((y * y).sum(1), 1, rtol=1e-12)
        seen.append(y)
        return {5: 1.0, 2: math.nan, 3: 1.0}[y.shape[1]]

    found = whitening.search(m, score, betas=[0.0, 1.0], gammas=[0.0, 1.0], ks=[2, 5, 3])
    assert [t[:3] for t in found.trials] == [(b, g, k) for b in (0.0, 1.0) for g in (0.0, 1.0) for k in (2, 5, 3)]
    assert found.best == (0.0, 0.0, 5, 1.0)
    for trial, y in zip(found.trials, seen, strict=True):
        expected = whitening.whiten(x, x[:7], beta=trial.beta, gamma=trial.gamma, k=trial.k)
        np.testing.assert_allclose(y, expected, atol=1e-12)
    assert math.isnan(found.trials[0].score)
    best = whitening.search(m, lambda encode: encode(x).shape[1], betas=[1.0], gammas=[1.0], ks=[1, 4, 2]).best
    assert (best.k, best.score) == (4, 4.0)


# Errors.
def test_errors():
    x = well(15)
    m, sigma = whitening.moments(x), np.cov(x.T)
    with pytest.raises(ShapeError, match=r"whitening.moments: expected x \(n, d\).*\(5,\)"):
        whitening.moments(x[0])
    with pytest.raises(ShapeError, match="d >= 1"):
        whitening.moments(x[:, :0])
    with pytest.raises(DomainError, match=r"x must be finite, received nan at index \[1, 2\]"):
        whitening.moments(np.where(np.arange(485).reshape(97, 5) == 7, np.nan, x))
    with pytest.raises(ShapeError, match="equal widths d"):
        whitening.merge(m, whitening.moments(x[:, :3]))
    with pytest.raises(ShapeError, match="at least one row"):
        whitening.moments_streamed([])
    with pytest.raises(ShapeError, match=r"blocks \(n, d\)"):
        whitening.moments_streamed([x[0]])
    with pytest.raises(ShapeError, match=r"blocks of one width, received block of shape \(97, 3\)"):
        whitening.moments_streamed([x, x[:, :3]])
    for bad in (np.nan, np.inf):
        broken = x.copy()
        broken[90, 4] = bad
        with pytest.raises(DomainError, match=r"blocks must be finite, .* at index \[90, 4\]"):
            whitening.moments_streamed([x, broken])
    with pytest.raises(ShapeError, match=r"mean \(d,\), scatter \(d, d\)"):
        Moments(3, np.zeros(2), np.zeros((3, 3)))
    with pytest.raises(DomainError, match="count >= 0"):
        Moments(-1, np.zeros(2), np.zeros((2, 2)))
    with pytest.raises(DomainError, match="at least one row"):
        whitening.covariance(whitening.moments(x[:0]), beta=1.0)
    with pytest.raises(DomainError, match="a finite beta, received beta=nan"):
        whitening.covariance(m, beta=math.nan)
    with pytest.raises(ShapeError, match=r"sigma \(d, d\)"):
        whitening.spectrum(x)
    with pytest.raises(DomainError, match="a symmetric sigma"):
        whitening.spectrum(np.triu(sigma))
    with pytest.raises(ShapeError, match=r"values \(d,\)"):
        whitening.rank(sigma)
    for function in (whitening.projection, whitening.projection_null_zero):
        for k in (0, 6, -1):
            with pytest.raises(DomainError, match=f"whitening.{function.__name__}: expected k in 1..5, received k={k}"):
                function(sigma, gamma=1.0, k=k)
        with pytest.raises(DomainError, match="gamma >= 0, received gamma=-0.5"):
            function(sigma, gamma=-0.5, k=1)
    w = whitening.projection(sigma, gamma=1.0, k=2)
    with pytest.raises(ShapeError, match=r"x of shape \(97, 5\), mean of shape \(4,\)"):
        whitening.transform(x, m.mean[:4], w, beta=1.0)
    with pytest.raises(ShapeError, match=r"w of shape \(4, 2\)"):
        whitening.transform(x, m.mean, w[:4], beta=1.0)
    with pytest.raises(DomainError, match="a finite beta"):
        whitening.transform(x, m.mean, w, beta=math.inf)
    with pytest.raises(ShapeError, match=r"x \(..., d\)"):
        whitening.normalize(np.array(1.0))
    with pytest.raises(ShapeError, match="n >= 2"):
        whitening.spearman(x[:1, 0], x[:1, 0])
    with pytest.raises(ShapeError, match=r"a \(..., n\), b \(..., n\)"):
        whitening.spearman(x[:, 0], x[:4, 0])
    with pytest.raises(DomainError, match="a score that is a number, received points=1"):
        whitening.search(m, lambda encode: math.nan, betas=[1.0], gammas=[1.0], ks=[2])
    with pytest.raises(DomainError, match="points=0"):
        whitening.search(m, lambda encode: 1.0, betas=[], gammas=[1.0], ks=[2])
