"""Graphs of attention kernels: masks of every size, rows with no key and with one, lengths that come from the mask."""

from functools import partial

import numpy as np
import pytest

from export.graph import build, op, where
from export.ops import attention_kernel as kernels
from refimpl.check import DomainError, ShapeError
from refimpl.ops import attention_kernel as spec

B, N, M = 2, 3, 7
KERNELS = {
    "softmax": {},
    "softmax_plus": {"n_min": 2},
    "squared_relu_visible": {},
    "squared_relu_array": {},
    "squared_relu_constant": {"length": 11},
    "laplace": {},
}
DTYPES = [np.float32, np.float64]


def both(name):
    """The kernel as a graph and as specified."""
    return partial(getattr(kernels, name), **KERNELS[name]), partial(getattr(spec, name), **KERNELS[name])


def made(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype) * 2


def masks(*shape):
    """Of the last axes of the scores, whole or as one: random, with a row that sees nothing and one that sees a key."""
    for axes in (shape, (shape[0], 1, shape[2]), (shape[0], shape[1], 1), (1, 1, shape[2]), shape[1:], shape[2:]):
        mask = np.random.default_rng(len(axes)).random(axes) < 0.6
        if mask.ndim > 1 and mask.shape[-2] > 1:
            mask[..., 0, :] = False
            mask[..., 1, :] = np.arange(mask.shape[-1]) == mask.shape[-1] // 2
        yield mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_masks_of_every_size(Graph, name, dtype):
    call, expected = both(name)
    scores = made(B, N, M, dtype=dtype)
    graphs = {}
    for mask in masks(B, N, M):
        graph = graphs.setdefault(mask.ndim, Graph(call, scores=scores, mask=mask))
        assert graph.fixed == {}
        graph.gives(expected(scores, mask), scores=scores, mask=mask)
        # What a masked score is changes nothing, and its weight is exactly 0.
        poisoned = np.where(mask, scores, np.finfo(dtype).max)
        graph.gives(expected(scores, mask), scores=poisoned, mask=mask)
        assert not graph(scores=poisoned, mask=mask)[~np.broadcast_to(mask, scores.shape)].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_one_graph_for_every_size(Graph, name, masked):
    call, expected = both(name)

    def given(*shape):
        mask = {"mask": next(masks(*shape))} if masked else {}
        return {"scores": made(*shape), **mask}

    graph = Graph(call if masked else partial(call, mask=None), **given(B, N, M))
    for shape in ((1, 1, 1), (3, 2, 1), (1, 5, 2), (3, 11, 13), (2, 0, 5), (2, 3, 0)):
        if name == "squared_relu_array" and not shape[-1]:
            continue
        arrays = given(*shape)
        # NumPy's softmax of no keys is a maximum of nothing.
        wanted = expected(arrays["scores"], arrays.get("mask")) if shape[-1] else np.zeros(shape)
        graph.gives(wanted, **arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_a_fully_masked_row_is_zeros(Graph, session, name, dtype):
    call, _ = both(name)
    scores, mask = made(N, M, dtype=dtype), np.zeros((N, M), bool)
    Graph(call, scores=scores, mask=mask).gives(np.zeros((N, M)), tolerance=0, scores=scores, mask=mask)
    # -inf, the usual spelling, gives NaN.
    written = build(lambda scores, mask: op("Softmax", where(mask, scores, -np.inf)), {"scores": scores, "mask": mask},
                    opset=20).model  # fmt: skip
    assert np.isnan(session(written)({"scores": scores, "mask": mask})[0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_visible_key(Graph, dtype):
    """Its length has logarithm 0: scores times 0 must not bring back the masked keys."""
    scores, mask = 100 * made(5, 5, dtype=dtype), np.eye(5, dtype=bool)
    Graph(partial(kernels.softmax_plus, n_min=1), scores=scores, mask=mask).gives(
        np.eye(5), tolerance=0, scores=scores, mask=mask
    )


def test_the_length_of_softmax_plus_comes_from_the_mask(Graph):
    """One graph: rows of 1, 2, 16 and 512 visible keys, then the same scores under other masks."""
    scores = made(4, 600)
    graph = Graph(partial(kernels.softmax_plus, n_min=2), scores=scores, mask=np.ones((4, 600), bool))
    assert not {"Loop", "If", "Range"} & graph.operators
    for lengths in ((1, 2, 16, 512), (512, 600, 0, 3)):
        mask = np.arange(600) < np.array(lengths)[:, None]
        graph.gives(spec.softmax_plus(scores, mask, n_min=2), scores=scores, mask=mask)
    # A row of 512 keys is a softmax; by hand, a row of 2 has weights in the ratio exp(difference / 9).
    mask = np.arange(600) < np.array([[512], [2], [2], [2]])
    scores[1, :2] = 0.0, 9 * np.log(3)
    found = graph(scores=scores, mask=mask)
    plain = np.exp(scores[0, :512] - scores[0, :512].max())
    assert np.allclose(found[0, :512], plain / plain.sum(), rtol=1e-13)
    assert np.allclose(found[1, :2], [0.25, 0.75], rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_literal_values(Graph, dtype):
    scores = np.array([[3.0, -1.0, 2.0, 100.0]], dtype)
    mask = np.array([[True, True, True, False]])

    def ran(name, scores=scores, mask=mask, **numbers):
        return Graph(partial(getattr(kernels, name), **numbers), scores=scores, mask=mask)(scores=scores, mask=mask)

    assert np.allclose(ran("squared_relu_visible"), [[3, 0, 4 / 3, 0]], rtol=1e-6)
    assert np.allclose(ran("squared_relu_array"), [[9 / 4, 0, 1, 0]], rtol=1e-6)
    assert np.allclose(ran("squared_relu_constant", length=2), [[9 / 2, 0, 2, 0]], rtol=1e-6)
    logs = np.log(np.array([[1, 2, 5, 7]])).astype(dtype)
    assert np.allclose(ran("softmax", scores=logs), [[1 / 8, 2 / 8, 5 / 8, 0]], rtol=1e-6)
    middle = np.array([[np.sqrt(0.5), 9.0, 0.0, 9.0]], dtype)
    assert np.allclose(ran("laplace", scores=middle), [[0.5, 1, 0.00609444, 0]], rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1e4, -1e4, 0.0])
def test_softmax_of_scores_of_any_size(Graph, dtype, offset):
    scores = (np.array([[0.0, 1.0, 2.0, 700.0], [-800.0, -800.0, 3.0, 3.0]]) + offset).astype(dtype)
    mask = np.array([[True, True, True, False], [True, True, False, False]])
    graph = Graph(kernels.softmax, scores=scores, mask=mask)
    graph.gives(spec.softmax(scores, mask), scores=scores, mask=mask)


def test_no_mask_has_no_nodes(Graph):
    scores = made(N, M, dtype=np.float32)
    for name in KERNELS:
        plain = Graph(partial(both(name)[0], mask=None), scores=scores).operators
        assert not {"Where", "Min", "ReduceSum", "Not", "And"} & plain


def test_visible_lengths(Graph):
    scores = made(B, N, M)
    for mask in masks(B, N, M):
        graph = Graph(kernels.visible_lengths, scores=scores, mask=mask)
        graph.gives(spec.visible_lengths(scores, mask), scores=scores, mask=mask)
    graph = Graph(partial(kernels.visible_lengths, mask=None), scores=scores)
    graph.gives(np.full((B, N, 1), M), scores=scores)
    graph.gives(np.full((1, 5, 1), 2), scores=made(1, 5, 2))


def test_what_does_not_fit_is_refused():
    scores = made(N, M)
    for name in KERNELS:
        call, _ = both(name)
        with pytest.raises(DomainError, match=f"attention_kernel.{name}: mask must be boolean"):
            build(call, {"scores": scores, "mask": np.ones((N, M))}, opset=20)
        with pytest.raises(DomainError, match="scores must be a floating value"):
            build(call, {"scores": np.ones((N, M), int), "mask": np.ones((N, M), bool)}, opset=20)
        for shape in ((B, N, M), (N, M - 1), (N + 1, M)):
            with pytest.raises(ShapeError, match="expected a mask that broadcasts to the scores"):
                build(call, {"scores": scores, "mask": np.ones(shape, bool)}, opset=20)
        with pytest.raises(ShapeError, match="scores with a key axis"):
            build(partial(call, mask=None), {"scores": np.ones(())}, opset=20)
    with pytest.raises(DomainError, match="n_min >= 1"):
        build(partial(kernels.softmax_plus, mask=None, n_min=0), {"scores": scores}, opset=20)
    with pytest.raises(DomainError, match="length >= 1"):
        build(partial(kernels.squared_relu_constant, mask=None, length=0), {"scores": scores}, opset=20)
