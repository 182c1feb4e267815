"""Whitening in torch: by hand, against the specification and SciPy, at rank deficiency, in 16 bits, under autograd."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from refimpl.check import DomainError, ShapeError
from refimpl.ops import whitening as spec
from torchimpl.ops import whitening
from torchimpl.ops.whitening import Moments

HALVES = [torch.float16, torch.bfloat16]
NAN = math.nan


def numbers(*shape, start=1):
    """Deterministic numbers in (-1, 1)."""
    count = torch.Size(shape).numel()
    return torch.sin(1.7 * torch.arange(start, start + count, dtype=torch.float64) ** 1.3).reshape(shape)


# 97 rows of five correlated features around a mean.
X = numbers(97, 5) @ (numbers(5, 5, start=600) + 2 * torch.eye(5)) + torch.tensor(
    [3.0, -1, 0, 7, 2], dtype=torch.float64
)


def close(found, expected, tolerance=1e-12):
    assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def cosines(y):
    return y @ y.T


# Moments


def test_moments_by_hand():
    m = whitening.moments(torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 4.0]]))
    assert (m.count, m.mean.tolist(), m.scatter.tolist()) == (3, [3, 4], [[8, 4], [4, 8]])
    none, one = whitening.moments(torch.zeros(0, 2)), whitening.moments(torch.tensor([[3.0, 4.0]]))
    assert (none.count, none.mean.tolist(), none.scatter.tolist()) == (0, [0, 0], [[0, 0], [0, 0]])
    assert (one.count, one.mean.tolist(), one.scatter.tolist()) == (1, [3, 4], [[0, 0], [0, 0]])
    merged = whitening.merge(whitening.merge(none, one), m)
    assert (merged.count, merged.mean.tolist()) == (4, [3, 4])
    assert merged.scatter.tolist() == [[8, 4], [4, 8]]
    close(whitening.covariance(m, beta=1.0).double(), [[8 / 3, 4 / 3], [4 / 3, 8 / 3]], 1e-6)
    close(whitening.covariance(m, beta=0.0).double(), [[35 / 3, 40 / 3], [40 / 3, 56 / 3]], 1e-6)


@pytest.mark.parametrize("block_rows", [1, 7, 2048])
def test_streams_equal_the_whole(block_rows, monkeypatch):
    monkeypatch.setattr(whitening, "BLOCK_ROWS", block_rows)
    x = X + 1e4
    whole, streamed = whitening.moments(x), whitening.moments_streamed(iter([x[:0], x[:5], x[5:6], x[6:]]))
    expected = spec.moments(x.numpy())
    for m in (whole, streamed):
        assert m.count == 97
        close(m.mean, expected.mean)
        # The common offset 1e4 costs nothing: 1e8 times 2^-53 would be 1e-8.
        close(m.scatter, expected.scatter, 1e-9)
    back = whitening.moments_streamed([x[50:], x[:50]])
    close(back.scatter, expected.scatter, 1e-9)


def test_moments_stay_as_they_are():
    m = whitening.moments(X)
    with pytest.raises(AttributeError):
        m.count = 3


# Spectrum and projections


def test_spectrum_descends_with_fixed_signs():
    values, vectors = whitening.spectrum(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    close(values, [3, 1])
    close(vectors[:, 0], [math.sqrt(0.5)] * 2)
    sigma = whitening.covariance(whitening.moments(X), beta=1.0)
    values, vectors = whitening.spectrum(sigma)
    theirs = spec.spectrum(sigma.numpy())
    close(values, theirs.values.copy())
    close(vectors, theirs.vectors.copy(), 1e-10)
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


def test_projection_by_hand():
    sigma = torch.diag(torch.tensor([4.0, 16.0, 1.0], dtype=torch.float64))
    close(whitening.projection(sigma, gamma=1.0, k=2), [[0, 0.5], [0.25, 0], [0, 0]])
    close(whitening.projection(sigma, gamma=0.5, k=3), [[0, 0.5**0.5, 0], [0.5, 0, 0], [0, 0, 1]])
    close(whitening.projection(sigma, gamma=0.0, k=1), [[0], [1], [0]])


def test_components_without_variance():
    # The third feature is the sum of the first two, the fourth never varies.
    sigma = torch.tensor([[2.0, 1, 3, 0], [1, 5, 6, 0], [3, 6, 9, 0], [0, 0, 0, 0]], dtype=torch.float64)
    values = whitening.spectrum(sigma).values
    assert whitening.rank(values) == whitening.rank(values.float()) == 2
    assert whitening.rank(torch.zeros(3)) == 0
    assert whitening.projection(sigma, gamma=1.0, k=4).isnan().all(dim=0).tolist() == [False, False, True, True]
    assert whitening.projection(sigma, gamma=0.0, k=4).isfinite().all()
    w = whitening.projection_null_zero(sigma, gamma=1.0, k=4)
    close(w[:, :2], whitening.projection(sigma, gamma=1.0, k=2))
    assert (w[:, 2:] == 0).all()
    close(w.T @ sigma @ w, torch.diag(torch.tensor([1.0, 1, 0, 0])))
    sigma.requires_grad_()
    (grad,) = torch.autograd.grad(whitening.projection_null_zero(sigma.detach() * sigma, gamma=1.0, k=2).sum(), sigma)
    assert grad.shape == (4, 4)


@pytest.mark.parametrize(("beta", "gamma", "k"), [(1.0, 1.0, 5), (0.0, 0.5, 3), (0.7, 0.25, 2), (1.0, 0.0, 4)])
def test_whitened_cosines_equal_the_specification(beta, gamma, k):
    named = {"beta": beta, "gamma": gamma, "k": k}
    got = whitening.whiten(X, X[:11], **named)
    close(cosines(got), cosines(torch.from_numpy(spec.whiten(X.numpy(), X[:11].numpy(), **named))), 1e-10)


def test_normalize_clips_the_norm():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-9, 4e-9]], dtype=torch.float64, requires_grad=True)
    got = whitening.normalize(x)
    close(got, [[0.6, 0.8], [0, 0], [0.3, 0.4]])
    got.sum().backward()
    # Below the floor a division by the floor.
    close(x.grad[1:], [[1e8, 1e8], [1e8, 1e8]])


def test_transform_by_hand():
    w = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    got = whitening.transform(torch.tensor([[[3.0, 5.0]]]), torch.tensor([2.0, 4.0]), w, beta=0.5)
    assert got.tolist() == [[[2, 7]]]


# Spearman


def test_spearman_against_scipy_and_by_hand():
    assert whitening.spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 100.0, 1000.0])).item() == 1
    # Ranks 1.5, 1.5, 3 and 1, 2, 3.
    got = whitening.spearman(torch.tensor([5.0, 5.0, 9.0]).double(), torch.tensor([1.0, 2.0, 3.0]).double())
    assert got.item() == pytest.approx(math.sqrt(3) / 2, rel=1e-15)
    assert whitening.spearman(torch.ones(3), torch.arange(3.0)).isnan()
    a, b = (numbers(3, 37) * 4).round(), (numbers(3, 37, start=500) * 9).round()
    expected = [scipy.stats.spearmanr(p, q).statistic for p, q in zip(a.numpy(), b.numpy(), strict=True)]
    close(whitening.spearman(a, b), expected)
    close(whitening.spearman(a.T.contiguous().T, b), expected)
    # Zero and minus zero are equal.
    assert whitening.spearman(torch.tensor([0.0, -0.0, 1.0]), torch.tensor([1.0, 1.0, 2.0])).item() == 1


@pytest.mark.parametrize("dtype", HALVES)
def test_sixteen_bits_neither_stall_nor_overflow(dtype):
    # Ranks to 4095, whose squares float16 does not hold and whose sums bfloat16 does not count.
    rising = torch.arange(4096, device="cpu").to(dtype)
    assert whitening.spearman(rising, -rising).item() == -1
    ones = torch.ones(4096, 3, dtype=dtype)
    m = whitening.moments(ones)
    assert (m.mean.tolist(), m.scatter.max().item(), m.mean.dtype) == ([1, 1, 1], 0, dtype)
    streamed = whitening.moments_streamed([ones, 3 * ones])
    assert (streamed.mean.tolist(), streamed.scatter[0, 0].item()) == ([2, 2, 2], 8192)
    assert whitening.normalize(300 * ones.T)[0, 0].item() == 2.0**-6
    # The scatter of 97 rows of size 100 is beyond float16.
    x = (100 * (X - X.mean(dim=0))).to(dtype)
    got = whitening.whiten(x, x[:11], beta=1.0, gamma=1.0, k=3)
    exact = whitening.whiten(x.double(), x[:11].double(), beta=1.0, gamma=1.0, k=3)
    assert got.dtype == dtype
    assert_close(cosines(got.double()), cosines(exact), rtol=0, atol=4 * torch.finfo(dtype).eps)


# The search


def test_search_scores_the_whole_grid_and_keeps_the_first_best():
    seen = []

    def score(encode):
        seen.append(encode(X[:7]))
        return {5: 1.0, 2: NAN, 3: 1.0}[seen[-1].shape[1]]

    found = whitening.search(whitening.moments(X), score, betas=[0.0, 1.0], gammas=[0.0, 1.0], ks=[2, 5, 3])
    assert [t[:3] for t in found.trials] == [(b, g, k) for b in (0.0, 1.0) for g in (0.0, 1.0) for k in (2, 5, 3)]
    assert found.best == (0.0, 0.0, 5, 1.0)
    for trial, y in zip(found.trials, seen, strict=True):
        expected = whitening.whiten(X, X[:7], beta=trial.beta, gamma=trial.gamma, k=trial.k)
        close(cosines(y), cosines(expected))


def test_a_point_beyond_the_rank_never_wins():
    flat = torch.cat([X, X.sum(dim=1, keepdim=True)], dim=1)
    found = whitening.search(
        whitening.moments(flat), lambda encode: encode(flat).sum().abs().item(), betas=[1.0], gammas=[1.0], ks=[6, 5]
    )
    assert found.best.k == 5 and math.isnan(found.trials[0].score)


# Gradients


def test_gradients():
    x = X[:7].clone().requires_grad_()

    def fitted(x):
        m = whitening.merge(whitening.moments(x[:3]), whitening.moments(x[3:]))
        return m.mean, m.scatter, whitening.covariance(m, beta=0.3)

    assert gradcheck(fitted, (x,))
    assert gradcheck(lambda x: whitening.moments_streamed([x[:2], x[2:]]).scatter, (x,))
    assert gradcheck(lambda x: whitening.whiten(x, x[:3], beta=0.7, gamma=0.5, k=2), (x,))
    assert gradcheck(whitening.normalize, (x,))
    sigma = torch.diag(torch.tensor([4.0, 16.0, 1.0, 0.0], dtype=torch.float64))

    def symmetric(s):
        return whitening.projection_null_zero(sigma + s + s.T, gamma=1.0, k=3)

    assert gradcheck(symmetric, (torch.zeros(4, 4, dtype=torch.float64, requires_grad=True),))


def test_compiled_with_open_sizes_equals_eager():
    def call(a, b, mean, w):
        encoded = whitening.normalize(whitening.transform(a, mean, w, beta=0.5))
        return encoded, whitening.spearman(a.T, b.T)

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    m = whitening.moments(X.float())
    w = whitening.projection(whitening.covariance(m, beta=0.5), gamma=1.0, k=3)
    for n in (11, 7):
        given = X[:n].float(), (5 * X[20 : 20 + n]).float().round(), m.mean, w
        assert_close(compiled(*given), call(*given))


M, SIGMA = whitening.moments(X), torch.from_numpy(np.cov(X.T.numpy()))


def searched(**changed):
    named = {"betas": [1.0], "gammas": [1.0], "ks": [2]} | changed
    return whitening.search(M, lambda encode: NAN if changed.get("ks") == [3] else 1.0, **named)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: whitening.moments(X[0]), ShapeError, r"whitening.moments: expected x \(n, d\).*\(5,\)"),
        (lambda: whitening.moments(X[:, :0]), ShapeError, "d >= 1"),
        (lambda: whitening.moments(X.long()), DomainError, "x must be a floating tensor"),
        (lambda: whitening.merge(M, whitening.moments(X[:, :3])), ShapeError, "equal widths d"),
        (lambda: whitening.moments_streamed([]), ShapeError, "at least one row"),
        (lambda: whitening.moments_streamed([X[:0]]), ShapeError, "at least one row"),
        (lambda: whitening.moments_streamed([X[0]]), ShapeError, r"blocks \(n, d\)"),
        (
            lambda: whitening.moments_streamed([X, X[:, :3]]),
            ShapeError,
            r"one width, received block of shape \(97, 3\)",
        ),
        (lambda: whitening.moments_streamed([X.long()]), DomainError, "blocks must be a floating tensor"),
        (lambda: Moments(3, torch.zeros(2), torch.zeros(3, 3)), ShapeError, r"mean \(d,\), scatter \(d, d\)"),
        (lambda: Moments(-1, torch.zeros(2), torch.zeros(2, 2)), DomainError, "count >= 0"),
        (lambda: Moments(3, torch.zeros(2), [[0.0]]), DomainError, "scatter must be a floating tensor"),
        (lambda: whitening.covariance(whitening.moments(X[:0]), beta=1.0), DomainError, "at least one row"),
        (lambda: whitening.covariance(M, beta=NAN), DomainError, "a finite beta, received beta=nan"),
        (lambda: whitening.spectrum(X), ShapeError, r"sigma \(d, d\)"),
        (lambda: whitening.rank(SIGMA), ShapeError, r"values \(d,\)"),
        (lambda: whitening.projection(SIGMA, gamma=1.0, k=0), DomainError, "whitening.projection: expected k in 1..5"),
        (lambda: whitening.projection(SIGMA, gamma=1.0, k=6), DomainError, "received k=6"),
        (lambda: whitening.projection(SIGMA, gamma=1.0, k=2.0), DomainError, "received k=2.0"),
        (lambda: whitening.projection(SIGMA, gamma=-0.5, k=2), DomainError, "gamma >= 0, received gamma=-0.5"),
        (lambda: whitening.projection_null_zero(SIGMA, gamma=math.inf, k=2), DomainError, "null_zero: .*gamma=inf"),
        (lambda: whitening.transform(X, M.mean[:3], SIGMA, beta=1.0), ShapeError, "whitening.transform: expected"),
        (lambda: whitening.transform(X, M.mean, SIGMA[:3], beta=1.0), ShapeError, r"w \(d, k\)"),
        (lambda: whitening.transform(X, M.mean, SIGMA, beta=math.inf), DomainError, "a finite beta"),
        (lambda: whitening.normalize(torch.tensor(1.0)), ShapeError, r"x \(..., d\)"),
        (lambda: whitening.whiten(X, X.long(), beta=1.0, gamma=1.0, k=2), DomainError, "whitening.whiten: x must be"),
        (lambda: whitening.spearman(X, X[:, :3]), ShapeError, r"b \(..., n\), n >= 2"),
        (lambda: whitening.spearman(X[:, :1], X[:, :1]), ShapeError, "n >= 2"),
        (lambda: searched(betas=[]), DomainError, "a grid with a score that is a number, received points=0"),
        (lambda: searched(ks=[3]), DomainError, "received points=1"),
        (lambda: searched(ks=[2, 0]), DomainError, "whitening.search: expected k in 1..5, received k=0"),
        (lambda: searched(gammas=[-1.0]), DomainError, "gamma >= 0"),
    ],
)
def test_errors_say_what_was_expected_and_received(call, error, says):
    with pytest.raises(error, match=says):
        call()
