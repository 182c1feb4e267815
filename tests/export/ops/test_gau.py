"""Graphs of gated attention units: one for all batches and lengths, masks and biases of every size, padding."""

from functools import partial

import numpy as np
import pytest

from export.graph import build
from export.ops import attention_kernel as kernels
from export.ops import gau, norm, rope
from refimpl.check import DomainError, ShapeError
from refimpl.ops import attention_kernel as spec_kernels
from refimpl.ops import gau as spec
from refimpl.ops import norm as spec_norm
from refimpl.ops import rope as spec_rope

B, N, D, E, S = 3, 5, 7, 11, 4
DTYPES = [np.float32, np.float64]
OPSETS = [20, 23]
KERNELS = {"softmax_plus": {"n_min": 2}, "squared_relu_visible": {}, "laplace": {}}
WEIGHTS = ("w_in", "b_in", "gamma_q", "beta_q", "gamma_k", "beta_k", "w_out", "b_out")
PLAIN = ("w_in", "gamma_q", "gamma_k", "w_out")
SHAPES = {"w_in": (D, 2 * E + S), "b_in": (2 * E + S,), "w_out": (E, D), "b_out": (D,)}


def made(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def weights(dtype, names):
    return {name: made(*SHAPES.get(name, (S,)), dtype=dtype, seed=i) for i, name in enumerate(WEIGHTS) if name in names}


def masked(*shape):
    mask = np.random.default_rng(shape).random(shape) < 0.6
    if mask.shape[-2] > 1:
        mask[..., 0, :] = False
        mask[..., 1, :] = np.arange(mask.shape[-1]) == 0
    return mask


def layer(name, *, kernel="squared_relu_visible", layout="rotate_interleaved", written=True, **numbers):
    """A unit or block by its name, as a graph or (`written` False) as specified; what is not given is None."""
    units, angles, of_kernels, norms = (
        (gau, rope, kernels, norm) if written else (spec, spec_rope, spec_kernels, spec_norm)
    )
    options = {"rotate": getattr(angles, layout), "kernel": partial(getattr(of_kernels, kernel), **KERNELS[kernel])}
    if name == "block_pre_norm":
        options["norm"] = partial(norms.rms_norm, epsilon=1e-6)

    def call(x, mask=None, bias=None, positions=None, **given):
        arrays = [given.get(weight) for weight in WEIGHTS]
        theta = angles.frequencies(S, base=100.0)
        return getattr(units, name)(x, mask, bias, positions, theta, *arrays, **options, **numbers)

    return call


LAYERS = {
    "unit": {},
    "unit_paper": {"length": 13},
    "block_post_norm": {"epsilon": 1e-6},
    "block_pre_norm": {"length": 13},
}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [PLAIN, WEIGHTS], ids=["plain", "biased"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_for_every_size(Graph, name, kernel, names, dtype, opset):
    call = layer(name, kernel=kernel, **LAYERS[name])
    expected = layer(name, kernel=kernel, written=False, **LAYERS[name])

    def given(b, n):
        others = {"mask": masked(b, 1, n) | (np.arange(n) == 0), "positions": np.arange(n)}
        return {"x": made(b, n, D, dtype=dtype), **others, **weights(dtype, names)}

    graph = Graph(call, opset, **given(B, N))
    assert {(name, axis) for name, axis in graph.fixed if name in ("x", "mask", "positions")} <= {("x", 2)}
    for b, n in ((1, 1), (3, 2), (2, 13)):
        arrays = given(b, n)
        graph.gives(expected(**arrays), tolerance=2e-5 if dtype == np.float32 else 1e-13, **arrays)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["rotate_interleaved", "rotate_half_split"])
def test_masks_biases_and_positions_of_every_size(Graph, layout, kernel):
    call, expected = (layer("unit", kernel=kernel, layout=layout, written=w) for w in (True, False))
    arrays = {"x": made(B, N, D), **weights(np.float64, WEIGHTS)}
    every, own = np.arange(N) + 1000, np.arange(B * N).reshape(B, N)
    shapes = (None, (B, N, N), (1, N, N), (B, 1, N), (B, N, 1), (N, N))
    for shape, positions in zip(shapes, (own, every, None, own, every, None), strict=True):
        given = arrays if positions is None else {**arrays, "positions": positions}
        if shape:
            given = {**given, "mask": masked(*shape), "bias": made(*shape[-2:]) / 4}
        Graph(call, **given).gives(expected(**given), tolerance=1e-13, **given)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("kernel", ["softmax_plus", "squared_relu_visible"])
def test_padding_changes_nothing(Graph, kernel, opset):
    """A batch of different lengths, against each sequence alone in the same graph."""
    arrays = {"x": made(3, N, D, dtype=np.float32), **weights(np.float32, PLAIN)}
    lengths = (N, 3, 1)
    valid = np.arange(N) < np.array(lengths)[:, None]
    arrays["x"][~valid] = 50.0
    positions = np.arange(N)
    graph = Graph(layer("unit", kernel=kernel), opset, **arrays, mask=valid[:, None], positions=positions)
    together = graph(**arrays, mask=valid[:, None], positions=positions)
    for row, length in enumerate(lengths):
        one = {**arrays, "x": arrays["x"][row : row + 1, :length], "positions": positions[:length]}
        alone = graph(**one, mask=np.ones((1, 1, length), bool))
        assert np.abs(together[row, :length] - alone[0]).max() < 1e-5 * np.abs(alone).max()


def test_a_token_that_sees_nothing(Graph):
    arrays = {"x": made(1, N, D), "mask": np.zeros((1, 1, N), bool), **weights(np.float64, WEIGHTS)}
    for kernel in KERNELS:
        graph = Graph(layer("unit", kernel=kernel), **arrays)
        graph.gives(np.broadcast_to(arrays["b_out"], (1, N, D)), tolerance=0, **arrays)


def test_no_batch_axis(Graph):
    arrays = {"x": made(N, D, dtype=np.float32), "positions": np.arange(N), **weights(np.float32, PLAIN)}
    for opset in OPSETS:
        graph = Graph(layer("unit"), opset, **arrays)
        graph.gives(layer("unit", written=False)(**arrays), tolerance=1e-5, **arrays)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("sides", ["", "q", "k", "qk"])
def test_cross_units(Graph, sides, opset):
    def call(x, keys_from, values_from, mask, written=True, **given):
        units, angles, of = (gau, rope, kernels) if written else (spec, spec_rope, spec_kernels)
        names = ("w_in", "b_in", "w_k", "b_k", "w_v", "b_v", "w_out", "b_out")
        positions = [given.get(f"positions_{side}") for side in "qk"]
        others = (mask, None, *positions, angles.frequencies(S, base=100.0))
        arrays = [given.get(name) for name in names]
        options = {"rotate": angles.rotate_half_split, "kernel": partial(of.softmax_plus, n_min=2)}
        return units.unit_cross(x, keys_from, values_from, *others, *arrays, **options)

    def given(b, n, m):
        found = {"x": made(b, n, D), "keys_from": made(b, m, 5), "values_from": made(b, m, 3), "mask": masked(b, n, m)}
        found |= {"w_in": made(D, E + S), "w_k": made(5, S), "b_k": made(S), "w_v": made(3, E), "w_out": made(E, D)}
        return found | {f"positions_{side}": 3 + np.arange({"q": n, "k": m}[side]) for side in sides}

    graph = Graph(call, opset, **given(B, N, 2))
    assert not {("x", 0), ("x", 1), ("keys_from", 1), ("values_from", 1), ("mask", 2)} & set(graph.fixed)
    for b, n, m in ((1, 1, 1), (2, 3, 13)):
        arrays = given(b, n, m)
        graph.gives(call(**arrays, written=False), tolerance=1e-13, **arrays)


def test_parts_and_scale_offset(Graph):
    x, given = made(B, N, D), weights(np.float64, ("w_in", "b_in"))
    graph = Graph(partial(gau.parts, key_width=S), x=x, **given)
    graph.gives(tuple(spec.parts(x, **given, key_width=S)), x=x, **given)
    # One product: a weight that is sliced could not be quantised.
    assert sum(node.op_type == "MatMul" for function in graph.model.functions for node in function.node) == 1
    z, gamma, beta = made(B, S), made(S), made(S, seed=1)
    Graph(gau.scale_offset, z=z, gamma=gamma, beta=beta).gives(z * gamma + beta, z=z, gamma=gamma, beta=beta)
    Graph(partial(gau.scale_offset, beta=None), z=z, gamma=gamma).gives(z * gamma, z=z, gamma=gamma)


def test_literal_values(Graph):
    """One token, one feature each: u = v = silu(2), z = silu(1), score (z / 2)^2 z^0 ... worked out by hand."""
    silu = {x: x / (1 + np.exp(-x)) for x in (1.0, 2.0)}
    arrays = {
        "x": np.array([[[1.0]]]),
        "w_in": np.array([[2.0, 2, 1, 0, 0, 0]]),
        "gamma_q": np.array([3.0, 0, 0, 0]),
        "gamma_k": np.array([5.0, 0, 0, 0]),
        "w_out": np.array([[7.0]]),
    }
    score = 3 * 5 * silu[1.0] ** 2 / 2
    graph = Graph(layer("unit"), **arrays)
    graph.gives(np.array([[[7 * silu[2.0] ** 2 * score**2]]]), **arrays)
    paper = Graph(layer("unit_paper", length=10), **arrays)
    paper.gives(np.array([[[7 * silu[2.0] ** 2 * (score / 5) ** 2]]]), **arrays)


def test_what_does_not_fit_is_refused():
    given = {"x": made(B, N, D), **weights(np.float64, PLAIN)}

    def refused(error, match, name="unit", **changes):
        with pytest.raises(error, match=match):
            build(layer(name, **LAYERS[name]), {**given, **changes}, opset=20)

    refused(ShapeError, "w_in of 2e \\+ 4 columns", w_in=made(D, 2 * E + S + 1))
    refused(ShapeError, "gamma_q \\(s,\\)", gamma_q=made(1, S))
    refused(ShapeError, "gamma \\(s,\\)", gamma_k=made(S + 1))
    refused(ShapeError, "beta \\(s,\\)", beta_k=made(S + 1))
    refused(ShapeError, "expected a mask", mask=np.ones((B, N), bool))
    refused(DomainError, "mask must be boolean", mask=np.ones((N, N)))
    refused(ShapeError, "a bias that broadcasts", bias=made(B, N + 1, N))
    refused(DomainError, "bias must be a floating value", bias=np.ones((N, N), int))
    refused(ShapeError, "x \\(..., in\\)", w_out=made(E + 1, D))
    for name in ("block_post_norm", "block_pre_norm"):
        refused(ShapeError, f"gau.{name}: expected a unit that ends in the width of x", name, w_out=made(E, D + 1))
    with pytest.raises(DomainError, match="length >= 1"):
        build(layer("unit_paper", length=0), given, opset=20)
    with pytest.raises(DomainError, match="key_width >= 1"):
        build(partial(gau.parts, b_in=None, key_width=0), {"x": given["x"], "w_in": given["w_in"]}, opset=20)

    def lacking(x, positions, w_in, gamma_q, gamma_k, w_out):
        flat = (w_in, None, gamma_q, None, gamma_k, None, w_out, None)
        options = {"rotate": rope.rotate_interleaved, "kernel": kernels.softmax}
        return gau.unit(x, None, None, positions, None, *flat, **options)

    with pytest.raises(DomainError, match="frequencies for positions"):
        build(lacking, {**given, "positions": np.arange(N)}, opset=20)
