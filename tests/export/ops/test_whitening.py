"""whitening as graphs: moments in any blocks, the eigensolver, one Gemm, ranks with ties, errors."""

import numpy as np
import pytest
from scipy import stats

from export import graph
from export.ops import whitening
from refimpl.check import DomainError, ShapeError
from refimpl.ops import whitening as spec

RNG = np.random.default_rng(0)


def parts(m):
    return m.mean, m.scatter


def orthogonal(d, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


# Moments.
def test_moments_of_any_number_of_rows(Graph):
    made = Graph(lambda x: (lambda m: (m.count, m.mean, m.scatter))(whitening.moments(x)), x=np.ones((3, 5)))
    assert made.fixed == {}
    for n, d in ((3, 5), (0, 5), (1, 5), (2, 1), (101, 7)):
        x = RNG.standard_normal((n, d)) + 8
        m = spec.moments(x)
        made.gives((m.count, m.mean, m.scatter), x=x)


def test_moments_by_hand(Graph):
    made = Graph(lambda x: parts(whitening.moments(x)), x=np.ones((2, 2)))
    made.gives((np.array([1.0, 2.0]), np.array([[2.0, 4.0], [4.0, 8.0]])), x=np.array([[0.0, 0.0], [2.0, 4.0]]))
    # One row alone scatters nothing, exactly.
    made.gives((np.array([0.1, 0.3]), np.zeros((2, 2))), x=np.array([[0.1, 0.3]]), tolerance=0)


def test_an_offset_costs_nothing(Graph):
    x = (RNG.integers(-8, 8, (13, 3)) / 64 + 1024).astype(np.float32)
    Graph(lambda x: whitening.moments(x).scatter, x=x).gives(spec.moments(x).scatter, x=x)


@pytest.mark.parametrize("sizes", [(), (3, 1, 4), (1, 1, 1), (0, 5, 0)])
def test_streams_equal_the_whole(Graph, sizes):
    cuts = np.cumsum([0, *sizes])

    def streamed(x, more):
        blocks = [x[a:b] for a, b in zip(cuts, cuts[1:], strict=False)] + [x[int(cuts[-1]) :], more]
        return parts(whitening.moments_streamed(block for block in blocks))

    made = Graph(streamed, x=np.ones((11, 3)), more=np.ones((2, 3)))
    for n, more in ((11, 2), (40, 0), (9, 1)):
        x, last = RNG.standard_normal((n, 3)) + 5, RNG.standard_normal((more, 3))
        made.gives(parts(spec.moments(np.concatenate([x, last]))), x=x, more=last, tolerance=1e-13)


@pytest.mark.parametrize(("count_a", "count_b"), [(5, 3), (0, 4), (4, 0), (0, 0), (3_000_000, 20_000_001)])
def test_merge_takes_counts_as_numbers_and_as_values(Graph, count_a, count_b):
    a, b = spec.moments(RNG.standard_normal((7, 3))), spec.moments(RNG.standard_normal((5, 3)) + 1)
    arrays = {"mean_a": a.mean, "scatter_a": a.scatter, "mean_b": b.mean, "scatter_b": b.scatter}
    expected = spec.merge(spec.Moments(count_a, a.mean, a.scatter), spec.Moments(count_b, b.mean, b.scatter))

    def merged(mean_a, scatter_a, mean_b, scatter_b, n_a=count_a, n_b=count_b):
        return parts(
            whitening.merge(whitening.Moments(n_a, mean_a, scatter_a), whitening.Moments(n_b, mean_b, scatter_b))
        )

    Graph(merged, **arrays).gives(parts(expected), **arrays)
    counts = {"n_a": np.array(count_a), "n_b": np.array(count_b)}
    Graph(merged, **arrays, **counts).gives(parts(expected), **arrays, **counts)
    Graph(merged, **arrays, n_b=counts["n_b"]).gives(parts(expected), **arrays, n_b=counts["n_b"])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_covariance(Graph, beta):
    x = RNG.standard_normal((7, 3)) + 2
    made = Graph(lambda x: whitening.covariance(whitening.moments(x), beta=beta), x=x)
    assert made.fixed == {}
    for rows in (x, x[:1], x[:2]):
        made.gives(spec.covariance(spec.moments(rows), beta=beta), x=rows)


def test_a_count_beside_the_product_keeps_float64(Graph):
    """ONNX Runtime would make 1/7 a float32 attribute of the product."""
    x = RNG.standard_normal((7, 3))
    made = Graph(lambda x: whitening.covariance(whitening.Moments(7, x.mean(0), x.swap(0, 1) @ x), beta=1.0), x=x)
    made.gives(x.T @ x / 7, x=x)


# The eigensolver.
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 8, 17])
def test_spectrum(Graph, d):
    """Values as LAPACK's, U diag U^T the matrix, U^T U one, the largest entry of a column positive."""
    made = Graph(lambda sigma: whitening.spectrum(sigma), sigma=np.eye(d))
    assert made.fixed == {("sigma", 0): d, ("sigma", 1): d}
    rows = RNG.standard_normal((2 * d, d))
    q = orthogonal(d)
    for a in (
        rows.T @ rows,
        rows[: (d + 1) // 2].T @ rows[: (d + 1) // 2],
        q * np.logspace(0, -14, d) @ q.T,
        q * np.resize([3.0, 1.0, 1e-3], d) @ q.T,
        np.ones((d, d)),
        -np.ones((d, d)) * 1e300,
        np.diag(np.arange(float(d))) * 1e-300,
        np.zeros((d, d)),
    ):
        a = (a + a.T) / 2
        expected, allowed = np.linalg.eigvalsh(a)[::-1], 4 * d * 2.0**-53 * np.linalg.norm(a, 2)
        for run in made.runs.values():
            values, u = run({"sigma": a})
            assert (np.diff(values) <= 0).all() and abs(values - expected).max() <= allowed
            assert abs(u * values @ u.T - a).max() <= allowed
            assert abs(u.T @ u - np.eye(d)).max() <= 4 * d * 2.0**-53
            assert (u[abs(u).argmax(0), np.arange(d)] > 0).all()


def test_clusters_of_equal_values_converge(Graph, monkeypatch):
    """Between equal values angles are large: turned too early they undo the rest, and 30 sweeps do not do."""
    monkeypatch.setattr(whitening, "MOST_SWEEPS", 13)
    d = 64
    q = orthogonal(d)
    a = q * np.repeat([3.0, 1.0, 1e-3], [22, 22, 20]) @ q.T
    a = (a + a.T) / 2
    values, u = Graph(lambda sigma: whitening.spectrum(sigma), sigma=a).runs["all"]({"sigma": a})
    # A tenth of what a solver is allowed: the vectors are made orthogonal again at the end.
    allowed = 0.1 * 4 * d * 2.0**-53
    assert abs(u * values @ u.T - a).max() <= 3 * allowed and abs(u.T @ u - np.eye(d)).max() <= allowed


def test_the_model_holds_no_matrix():
    built = graph.build(lambda sigma: whitening.spectrum(sigma), {"sigma": np.eye(100)}, opset=20)
    assert built.model.ByteSize() < 20_000


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rank(Graph, dtype):
    made = Graph(whitening.rank, values=np.ones(4, dtype))
    cut = 4 * 2.0**-52
    for values, right in (([1, 2 * cut, cut, 0], 2), ([0, 0, 0, 0], 0), ([-1, -1, -1, -1], 0), ([4, 3, 2, 1], 4)):
        values = np.array(values, dtype)
        assert spec.rank(values) == right
        made.gives(np.int64(right), values=values)


SIGMA = np.array([[4.0, 1, 0.5], [1, 3, 0.25], [0.5, 0.25, 1]])


@pytest.mark.parametrize("function", ["projection", "projection_null_zero"])
@pytest.mark.parametrize(("gamma", "k"), [(1.0, 3), (1.0, 2), (0.5, 3), (0.0, 1)])
def test_projection(Graph, function, gamma, k):
    made = Graph(lambda sigma: getattr(whitening, function)(sigma, gamma=gamma, k=k), sigma=SIGMA)
    made.gives(getattr(spec, function)(SIGMA, gamma=gamma, k=k), sigma=SIGMA)


def test_components_without_variance_become_zero_columns(Graph):
    sigma = np.diag([0.0, 4, 0, 1])
    made = Graph(lambda sigma: whitening.projection_null_zero(sigma, gamma=1.0, k=3), sigma=sigma)
    expected = np.zeros((4, 3))
    expected[1, 0], expected[3, 1] = 0.5, 1.0
    made.gives(expected, sigma=sigma)


# Use.
@pytest.mark.parametrize("lead", [(), (7,), (2, 3)], ids=str)
def test_transform(Graph, lead):
    x, mean, w = RNG.standard_normal((*lead, 5)), RNG.standard_normal(5), RNG.standard_normal((5, 3))
    made = Graph(lambda x, mean, w: whitening.transform(x, mean, w, beta=0.3), x=x, mean=mean, w=w)
    assert made.fixed == {} and ("Gemm" in made.operators) == (len(lead) == 1)
    made.gives(spec.transform(x, mean, w, beta=0.3), x=x, mean=mean, w=w)
    if lead:
        few, narrow = x[:0], {"mean": mean[:2], "w": w[:2, :1]}
        made.gives(spec.transform(few, mean, w, beta=0.3), x=few, mean=mean, w=w)
        made.gives(spec.transform(x[..., :2], **narrow, beta=0.3), x=x[..., :2], **narrow)


def test_normalize(Graph):
    x = np.array([[3.0, 4.0], [0.0, 0.0], [3e-9, 4e-9], [6e-9, 8e-9], [3e-12, 4e-12]])
    expected = np.array([[0.6, 0.8], [0, 0], [0.3, 0.4], [0.6, 0.8], [3e-4, 4e-4]])
    made = Graph(whitening.normalize, x=x[:2])
    made.gives(expected, x=x)
    made.gives(expected[:0], x=x[:0])


@pytest.mark.parametrize(("beta", "gamma", "k"), [(1.0, 1.0, 4), (0.5, 0.75, 2), (0.0, 0.0, 4)])
def test_whiten(Graph, beta, gamma, k):
    made = Graph(
        lambda sample, x: whitening.whiten(sample, x, beta=beta, gamma=gamma, k=k),
        sample=RNG.standard_normal((9, 4)), x=RNG.standard_normal((2, 4)),
    )  # fmt: skip
    for n, m in ((9, 2), (31, 1), (6, 0)):
        sample, x = RNG.standard_normal((n, 4)) * [1, 2, 4, 8] + 1, RNG.standard_normal((m, 4))
        expected = spec.whiten(sample, x, beta=beta, gamma=gamma, k=k)
        made.gives(expected, sample=sample, x=x, tolerance=1e-12)


def test_whiten_float32(Graph):
    sample, x = ((RNG.standard_normal((n, 4)) * [1, 2, 4, 8]).astype(np.float32) for n in (101, 5))
    made = Graph(lambda sample, x: whitening.whiten(sample, x, beta=1.0, gamma=1.0, k=4), sample=sample, x=x)
    assert made(sample=sample, x=x).dtype == np.float32
    made.gives(spec.whiten(sample, x, beta=1.0, gamma=1.0, k=4), sample=sample, x=x, tolerance=5e-6)


def test_spearman(Graph):
    """Ties share the mean of their ranks, as in SciPy; a constant gives NaN."""
    made = Graph(whitening.spearman, a=np.ones((2, 3)), b=np.ones((2, 3)))
    assert made.fixed == {}
    for n in (2, 3, 29):
        a, b = RNG.integers(0, 4, (3, n)) + 0.5, RNG.standard_normal((3, n))
        a[:, :2] = [0, 9]
        made.gives(np.array([stats.spearmanr(*pair).statistic for pair in zip(a, b, strict=True)]), a=a, b=b)
    found = made(a=np.array([[1.0, 1, 1], [1, 2, 2]]), b=np.array([[1.0, 2, 3], [1, 2, 2]]))
    assert np.isnan(found[0]) and found[1] == 1


def test_search(Graph):
    """The score is part of the graph; NaN never wins, the first of equals does."""
    sample, x = RNG.standard_normal((29, 4)) * [1, 2, 4, 8] + 1, RNG.standard_normal((7, 4)) + 1
    grid = {"betas": (1.0, 0.5), "gammas": (0.0, 1.0), "ks": (2, 4)}

    def searched(sample, x):
        best, trials = whitening.search(whitening.moments(sample), lambda encode: encode(x).sum([0, 1]) ** 2, **grid)
        return (*best, *(t.score for t in trials))

    best, trials = spec.search(spec.moments(sample), lambda encode: encode(x).sum() ** 2, **grid)
    made = Graph(searched, sample=sample, x=x)
    expected = tuple(np.asarray(number) for number in (*best, *(t.score for t in trials)))
    made.gives(expected, sample=sample, x=x, tolerance=1e-11)

    scores = [np.nan, 1.0, 3.0, np.nan, 3.0, 2.0, -1.0, 0.0]

    def fixed(x):
        rest = iter(scores)
        m = whitening.moments(x)
        return tuple(whitening.search(m, lambda _: graph.constant(next(rest)), **grid).best)

    for run in Graph(fixed, x=sample).runs.values():
        assert [float(number) for number in run({"x": sample})] == [1.0, 1.0, 2, 3.0]


# Errors.
ONE, TWO = "whitening.Moments(1, v, a)", "whitening.Moments(1, v[:2], a[:2, :2])"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("moments(v)", ShapeError),
        ("moments(n)", DomainError),
        (f"merge({ONE}, {TWO})", ShapeError),
        ("merge(whitening.Moments(1, v, a[:2]), whitening.Moments(1, v, a))", ShapeError),
        ("moments_streamed([])", ShapeError),
        ("moments_streamed([a, a[:, :2]])", ShapeError),
        ("covariance(whitening.Moments(0, v, a), beta=1.0)", DomainError),
        (f"covariance({ONE}, beta=float('nan'))", DomainError),
        ("spectrum(a[:2])", ShapeError),
        ("spectrum(v)", ShapeError),
        ("rank(a)", ShapeError),
        ("projection(a, gamma=-1.0, k=1)", DomainError),
        ("projection(a, gamma=1.0, k=0)", DomainError),
        ("projection_null_zero(a, gamma=1.0, k=4)", DomainError),
        ("projection(v, gamma=1.0, k=1)", ShapeError),
        ("transform(a, v[:2], a, beta=1.0)", ShapeError),
        ("transform(a, v, a, beta=float('inf'))", DomainError),
        ("normalize(n)", DomainError),
        ("spearman(a, a[:2])", ShapeError),
        ("spearman(v[:1], v[:1])", ShapeError),
        (f"search({ONE}, None, betas=(), gammas=(1.0,), ks=(1,))", DomainError),
        (f"search({ONE}, None, betas=(1.0,), gammas=(1.0,), ks=(4,))", DomainError),
    ],
)
def test_errors_name_the_operation(text, error):
    def call(a, v, n):
        return eval(f"whitening.{text}", {"whitening": whitening, "a": a, "v": v, "n": n})

    with pytest.raises(error, match=r"whitening\.\w+: "):
        graph.build(call, {"a": np.eye(3), "v": np.ones(3), "n": np.ones((2, 3), int)}, opset=20)
