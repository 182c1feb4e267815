"""Graphs of heads: spans of any length in the specified order, thresholds between two floats, hidden scores."""

from functools import partial

import numpy as np
import pytest

from export.graph import build
from export.ops import head
from refimpl.check import DomainError, ShapeError
from refimpl.ops import head as spec

B, N, D, H, S = 3, 5, 7, 2, 6
DTYPES = [np.float32, np.float64]
OPSETS = [20, 23]


def made(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def tokens(b, n, dtype, own=False):
    mask = np.random.default_rng(n).random((b, n)) < 0.7
    positions = np.random.default_rng(n).integers(-50, 50, (b, n) if own else (n,))
    return {"x": made(b, n, D, dtype=dtype), "mask": mask, "positions": positions}


def dense(columns, dtype, rows=D, prefix=""):
    return {f"{prefix}kernel": made(rows, columns, dtype=dtype), f"{prefix}bias": made(columns, dtype=dtype)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_classes_and_choices(Graph, dtype):
    graph = Graph(head.classify, x=made(B, D, dtype=dtype), **dense(11, dtype))
    choices = Graph(head.choose, x=made(B, 4, D, dtype=dtype), mask=np.ones((B, 4), bool), **dense(1, dtype))
    for b in (1, 5):
        arrays = {"x": made(b, D, dtype=dtype), **dense(11, dtype)}
        graph.gives(spec.classify(**arrays), **arrays)
        arrays = {"x": made(b, 3, D, dtype=dtype), **dense(1, dtype)}
        for mask in (np.arange(3) < np.ones((b, 1)) * 2, np.zeros((b, 3), bool)):
            choices.gives(spec.choose(**arrays, mask=mask), mask=mask, **arrays)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True], ids=["common positions", "own positions"])
@pytest.mark.parametrize("name", ["global_pointer", "efficient_global_pointer"])
def test_pointers(Graph, name, own, dtype, opset):
    numbers = {"base": 100.0, **({"heads": H} if name == "global_pointer" else {})}
    call, expected = (partial(getattr(module, name), **numbers) for module in (head, spec))

    def given(b, n):
        if name == "global_pointer":
            return {**tokens(b, n, dtype, own), **dense(2 * H * S, dtype)}
        return {**tokens(b, n, dtype, own), **dense(2 * S, dtype), **dense(2 * H, dtype, rows=2 * S, prefix="type_")}

    graph = Graph(call, opset, **given(B, N))
    assert not {("x", 0), ("x", 1), ("mask", 0), ("mask", 1), ("positions", 0)} & set(graph.fixed)
    for b, n in ((1, 1), (3, 2), (1, 0), (2, 13)):
        arrays = given(b, n)
        graph.gives(expected(**arrays), tolerance=1e-5 if dtype == np.float32 else 1e-13, **arrays)
        # Without a batch axis the graph is another one.
    arrays = {k: v[0] if k in ("x", "mask") or (own and k == "positions") else v for k, v in given(1, N).items()}
    Graph(call, opset, **arrays).gives(expected(**arrays), tolerance=1e-5, **arrays)


def test_literal_pointers(Graph):
    """Width 2, one type, x itself: q = (x, 0), k = (1, 0) turned by as many radians as the position."""
    given = {"x": np.array([[[3.0], [5.0], [7.0]]]), "kernel": np.array([[1.0, 0, 0, 0]]),
             "bias": np.array([0.0, 0, 1, 0]), "mask": np.array([[True, True, False]])}  # fmt: skip
    root, no = np.sqrt(2), -np.inf
    expected = np.array([[3 / root, 3 * np.cos(2) / root, no], [no, 5 / root, no], [no, no, no]])[None, None]
    graph = Graph(partial(head.global_pointer, heads=1, base=7.0), **given, positions=np.array([1, 3, 9]))
    graph.gives(expected, **given, positions=np.array([1, 3, 9]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_spans(Graph, dtype):
    graph = Graph(partial(head.decode_spans, threshold=0.25), scores=made(H, N, N, dtype=dtype))
    assert graph.fixed == {}
    for h, n in ((1, 1), (3, 7), (2, 0), (H, N)):
        scores = made(h, n, n, dtype=dtype, seed=1)
        graph.gives(spec.decode_spans(scores, threshold=0.25), scores=scores)
    scores = np.full((2, 3, 3), -np.inf, dtype)
    graph.gives(np.zeros((0, 3), int), scores=scores)
    # By type, then start, then end; (1, 0) ends before it starts, (2, 2) is at the threshold.
    for place, score in {(1, 0, 2): 1, (0, 1, 2): 9, (0, 1, 1): 2, (0, 1, 0): 7, (1, 2, 2): 0.25}.items():
        scores[place] = score
    graph.gives(np.array([[0, 1, 1], [0, 1, 2], [1, 0, 2]]), scores=scores)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.1, -0.1, 1 / 3, 16777217.0, 1e300, -1e300, 0.0])
def test_a_threshold_between_two_floats(Graph, threshold, dtype):
    """float32(0.1) lies above 0.1, so a score of that size is a span."""
    near = np.asarray(threshold).clip(-3e38, 3e38).astype(dtype)
    values = [near, np.nextafter(near, dtype(np.inf)), np.nextafter(near, dtype(-np.inf)), dtype(-np.inf)]
    scores = np.array(values, dtype).reshape(4, 1, 1)
    expected = spec.decode_spans(scores, threshold=threshold)
    Graph(partial(head.decode_spans, threshold=threshold), scores=scores).gives(expected, scores=scores)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_length", [1, 3, 100])
def test_best_spans(Graph, max_length, dtype):
    call, expected = (partial(module.best_span, max_length=max_length) for module in (head, spec))
    graph = Graph(call, scores=made(B, N, N, dtype=dtype))
    assert graph.fixed == {}
    for b, n in ((1, 1), (2, 2), (2, 0), (3, 13)):
        # Few different scores, so that many are equal.
        scores = np.round(made(b, n, n, dtype=dtype))
        graph.gives(tuple(expected(scores)), scores=scores)
        graph.gives(tuple(expected(scores - np.inf)), scores=scores - np.inf)
    for scores in (made(N, N, dtype=dtype), made(2, 1, N, N, dtype=dtype)):
        Graph(call, scores=scores).gives(tuple(expected(scores)), scores=scores)


def test_the_best_of_equal_spans(Graph):
    scores = np.array([[0.0, 4, 9], [9, 4, 4], [9, 9, 4]])
    graph = Graph(partial(head.best_span, max_length=2), scores=scores)
    # 9 is out of reach or below the diagonal; of the fours, (0, 1) starts first.
    graph.gives((np.array(0), np.array(1), np.array(4.0)), scores=scores)
    hidden = np.where(np.eye(3, dtype=bool)[::-1], scores, -np.inf)
    graph.gives((np.array(1), np.array(1), np.array(4.0)), scores=hidden)
    nothing = np.where(np.tri(3, k=-1, dtype=bool), scores, -np.inf)
    graph.gives((np.array(-1), np.array(-1), np.array(-np.inf)), scores=nothing)


def test_what_does_not_fit_is_refused():
    def refused(error, match, call, **given):
        with pytest.raises(error, match=match):
            build(call, given, opset=20)

    x, mask = made(B, 4, D), np.ones((B, 4), bool)
    refused(ShapeError, "head.classify: .*kernel \\(d, k\\)", head.classify, x=x, **dense(3, np.float64, rows=D + 1))
    refused(ShapeError, "head.choose: .*kernel \\(d, 1\\)", head.choose, x=x, mask=mask, **dense(2, np.float64))
    refused(ShapeError, "mask \\(..., k\\)", head.choose, x=x, mask=mask[:, 1:], **dense(1, np.float64))
    refused(DomainError, "mask must be boolean", head.choose, x=x, mask=x[..., 0], **dense(1, np.float64))

    given = {**tokens(B, N, np.float64), **dense(2 * H * S, np.float64)}

    def pointer(heads=H, **changes):
        return {"call": partial(head.global_pointer, heads=heads, base=9.0), **given, **changes}

    refused(DomainError, "heads >= 1", **pointer(heads=0))
    refused(DomainError, "an even head size", **pointer(heads=5))
    refused(DomainError, "positions must be integers", **pointer(positions=np.ones(N)))
    refused(ShapeError, "positions \\(n,\\)", **pointer(positions=np.arange(N + 1)))
    refused(ShapeError, "mask \\(..., n\\)", **pointer(mask=np.ones((B, N + 1), bool)))
    refused(DomainError, "base > 0", partial(head.global_pointer, heads=H, base=0.0), **given)
    efficient = partial(head.efficient_global_pointer, base=9.0)
    one = {**tokens(B, N, np.float64), **dense(2 * S, np.float64)}
    odd = {**tokens(B, N, np.float64), **dense(2 * 3, np.float64)}
    refused(DomainError, "type_kernel width 2 h", efficient, **one, **dense(3, np.float64, 2 * S, "type_"))
    refused(DomainError, "an even head size", efficient, **odd, **dense(4, np.float64, 6, "type_"))

    scores = made(H, N, N)
    refused(ShapeError, "\\(h, n, n\\)", partial(head.decode_spans, threshold=0.0), scores=scores[0])
    refused(ShapeError, "\\(h, n, n\\)", partial(head.decode_spans, threshold=0.0), scores=scores[:, 1:])
    refused(DomainError, "a finite threshold", partial(head.decode_spans, threshold=np.nan), scores=scores)
    refused(ShapeError, "\\(..., n, n\\)", partial(head.best_span, max_length=1), scores=scores[:, 1:])
    refused(DomainError, "max_length >= 1", partial(head.best_span, max_length=0), scores=scores)
