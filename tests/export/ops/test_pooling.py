"""Graphs of pooling: one for all batches and lengths, rows without a token, masked tokens that hold anything."""

import numpy as np
import pytest

from export.graph import build
from export.ops import pooling
from refimpl.check import DomainError, ShapeError
from refimpl.ops import pooling as spec

B, N, D, E = 3, 5, 7, 11
DTYPES = [np.float32, np.float64]


def made(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def given(name, b, n, dtype):
    mask = np.random.default_rng(n).random((b, n)) < 0.6
    mask[0] = False
    x, other = made(b, n, D, dtype=dtype), made(b, n, D, dtype=dtype, seed=1)
    dense = {"kernel": made(D, E, dtype=dtype), "bias": made(E, dtype=dtype)}
    return {
        "first": {"x": x},
        "masked_mean": {"x": x, "mask": mask},
        "first_last_average": {"first": x, "last": other, "mask": mask},
        "pooler_linear": {"x": x, **dense},
        "pooler_tanh": {"x": x, **dense},
    }[name]


NAMES = ("first", "masked_mean", "first_last_average", "pooler_linear", "pooler_tanh")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_every_size(Graph, name, dtype):
    graph = Graph(getattr(pooling, name), **given(name, B, N, dtype))
    assert {axis for input_, axis in graph.fixed if input_ in ("x", "first", "last", "mask")} <= {2}
    # Only the means are defined for no tokens at all.
    for b, n in ((1, 1), (2, 13), *([(2, 0)] if "mask" in given(name, B, N, dtype) else [])):
        arrays = given(name, b, n, dtype)
        graph.gives(getattr(spec, name)(**arrays), **arrays)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [2, 4])
def test_other_ranks(Graph, name, rank):
    arrays = given(name, B, N, np.float64)
    batch = {k: v[1] if rank == 2 else np.stack([v, v[::-1]]) for k, v in arrays.items() if k not in ("kernel", "bias")}
    arrays |= batch
    Graph(getattr(pooling, name), **arrays).gives(getattr(spec, name)(**arrays), **arrays)


def test_literal_values(Graph):
    x = np.array([[[1.0, 10], [3, 30], [1e6, -1e6]], [[5, 50], [7, 70], [9, 90]]])
    mask = np.array([[True, True, False], [False, False, False]])
    Graph(pooling.masked_mean, x=x, mask=mask).gives(np.array([[2.0, 20], [0, 0]]), x=x, mask=mask)
    halves = np.array([[1.5, 15.0], [0, 0]])
    last = np.zeros_like(x)
    last[0, 0] = 2.0, 20.0
    Graph(pooling.first_last_average, first=x, last=last, mask=mask).gives(halves, first=x, last=last, mask=mask)
    Graph(pooling.first, x=x).gives(np.array([[1.0, 10], [5, 50]]), x=x)
    kernel, bias = np.array([[1.0, 0, 2], [0, 1, 0]]), np.array([0.0, -10, -2])
    graph = Graph(pooling.pooler_linear, x=x, kernel=kernel, bias=bias)
    graph.gives(np.array([[1.0, 0, 0], [5, 40, 8]]), x=x, kernel=kernel, bias=bias)
    graph = Graph(pooling.pooler_tanh, x=x, kernel=kernel, bias=bias)
    graph.gives(np.tanh([[1.0, 0, 0], [5, 40, 8]]), x=x, kernel=kernel, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums(Graph, dtype):
    x, mask = np.ones((2, 4099, 3), dtype), np.ones((2, 4099), bool)
    Graph(pooling.masked_mean, x=x, mask=mask).gives(np.ones((2, 3)), tolerance=0, x=x, mask=mask)


def test_what_does_not_fit_is_refused():
    def refused(error, match, name, **changes):
        with pytest.raises(error, match=f"pooling.{name}: .*{match}"):
            build(getattr(pooling, name), {**given(name, B, N, np.float64), **changes}, opset=20)

    for shape in ((B, N + 1), (B, N, D), (N,)):
        refused(ShapeError, "mask of shape", "masked_mean", mask=np.ones(shape, bool))
        refused(ShapeError, "mask of shape", "first_last_average", mask=np.ones(shape, bool))
    refused(DomainError, "must be boolean", "masked_mean", mask=np.ones((B, N)))
    refused(DomainError, "must be a floating value", "first", x=np.ones((B, N, D), int))
    refused(ShapeError, "x of shape", "first", x=made(D))
    refused(ShapeError, "equal shapes", "first_last_average", last=made(B, N + 1, D))
    for name in ("pooler_linear", "pooler_tanh"):
        refused(ShapeError, "kernel \\(d, e\\)", name, kernel=made(D + 1, E))
        refused(ShapeError, "bias \\(e,\\)", name, bias=made(D))
