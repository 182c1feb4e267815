"""Graphs of the norms: the epsilon that a runtime exchanges, offsets that a one-pass variance loses, empty spreads."""

from functools import partial

import numpy as np
import pytest

from export.graph import build, op, sqrt
from export.ops import norm
from refimpl.check import DomainError, ShapeError
from refimpl.ops import norm as spec

D = 7
RNG = np.random.default_rng(3)
SCALE, BIAS = RNG.normal(size=D), RNG.normal(size=D)
NAMES = {"rms_norm": (), "rms_norm_scaled": ("scale",), "layer_norm": ("scale", "bias")}
AFFINE = {"scale": SCALE, "bias": BIAS}


def arguments(name, x):
    return {"x": x, **{k: AFFINE[k].astype(x.dtype) for k in NAMES[name]}}


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_every_size(Graph, name, epsilon, dtype, opset):
    graph = Graph(partial(getattr(norm, name), epsilon=epsilon), opset, **arguments(name, np.zeros((2, 3, D), dtype)))
    # The width alone is fixed.
    assert set(graph.fixed) <= {("x", 2), ("scale", 0), ("bias", 0)}
    for shape in ((1, 0, D), (1, 1, D), (3, 11, D)):
        x = RNG.normal(size=shape).astype(dtype)
        given = arguments(name, x)
        graph.gives(getattr(spec, name)(**given, epsilon=epsilon), **given)


def test_literal_values(Graph):
    x = np.array([[1.0, -1, 1, -1], [3, 4, 0, 0]])
    Graph(partial(norm.rms_norm, epsilon=3.0), x=x).gives(np.array([[0.5, -0.5, 0.5, -0.5], [*(x[1] / 3.0413812651)]]),
                                                          tolerance=1e-10, x=x)  # fmt: skip
    one, two = np.array([1.0, 1, 2, 2]), np.array([0.0, 1, 0, 1])
    graph = Graph(partial(norm.layer_norm, epsilon=0.0), x=x, scale=one, bias=two)
    graph.gives(np.array([[1.0, 0, 2, -1], [*((x[1] - 1.75) / np.sqrt(3.1875) * one + two)]]), x=x, scale=one, bias=two)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-6])
def test_the_optimiser_leaves_epsilon_alone_in_float64(Graph, session, epsilon):
    """In float64, ONNX Runtime makes Pow, ReduceMean, Add, Sqrt, Div, Mul a norm of its own, of epsilon 1e-5."""
    x = 1e-3 * RNG.normal(size=(5, D))
    given = {"x": x, "scale": SCALE}

    def by_power(x, scale):
        return x / sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale

    def normed(epsilon):
        return spec.rms_norm_scaled(x, SCALE, epsilon=epsilon)

    trapped = session(build(by_power, given, opset=20).model)(given)[0]
    assert np.abs(trapped - normed(1e-5)).max() < 1e-6
    assert np.abs(trapped - normed(epsilon)).max() > 0.1
    for opset in (20, 23):
        Graph(partial(norm.rms_norm_scaled, epsilon=epsilon), opset, **given).gives(normed(epsilon), **given)
        Graph(partial(norm.rms_norm, epsilon=epsilon), opset, x=x).gives(spec.rms_norm(x, epsilon=epsilon), x=x)


def test_the_operators_epsilon_is_a_float32(Graph, session):
    """Why float64 is written out."""
    x = 1e-8 * RNG.normal(size=(5, D))
    given = arguments("layer_norm", x)
    expected = spec.layer_norm(**given, epsilon=1e-12)
    Graph(partial(norm.layer_norm, epsilon=1e-12), **given).gives(expected, **given)

    def by_operator(x, scale, bias):
        return op("LayerNormalization", x, scale, bias, epsilon=1e-12)

    trapped = session(build(by_operator, given, opset=20).model)(given)[0]
    assert 1e-13 < np.abs(trapped - expected).max() < 1e-9


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_common_offset_costs_nothing_but_its_digits(Graph, dtype):
    """A variance formed as mean(x^2) - mean(x)^2 would be 0 or noise."""
    steps = np.array([[-3.0, -2, -1, 0, 1, 2, 3]])
    # On a grid that both formats hold.
    offset = {np.float32: 2.0**16, np.float64: 2.0**40}[dtype]
    given = {"x": (offset + steps).astype(dtype), "scale": np.ones(D, dtype), "bias": np.zeros(D, dtype)}
    Graph(partial(norm.layer_norm, epsilon=1e-12), **given).gives(steps / 2, tolerance=1e-6, **given)


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("epsilon", [0.0, 1e-12])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_without_spread(Graph, dtype, epsilon, opset):
    # A third is no number of either format, so that the mean of seven of them is rounded.
    x = np.stack([np.zeros(D), np.full(D, 1 / 3), np.full(D, -1e10)]).astype(dtype)
    zeros = np.zeros((1, D), dtype)
    given = arguments("layer_norm", x)
    shown = np.broadcast_to(given["bias"], x.shape)
    # onnx's own LayerNormalization rounds the mean.
    among = ("off", "all") if dtype == np.float32 and epsilon else ("off", "all", "onnx")
    Graph(partial(norm.layer_norm, epsilon=epsilon), opset, **given).gives(shown, tolerance=0, among=among, **given)
    Graph(partial(norm.rms_norm, epsilon=epsilon), opset, x=zeros).gives(zeros, tolerance=0, x=zeros)
    given = arguments("rms_norm_scaled", zeros)
    Graph(partial(norm.rms_norm_scaled, epsilon=epsilon), opset, **given).gives(zeros, tolerance=0, **given)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_width_0_is_empty(Graph):
    x, none = np.zeros((3, 0)), np.zeros(0)
    Graph(partial(norm.rms_norm, epsilon=0.0), x=x).gives(x, x=x)
    Graph(partial(norm.layer_norm, epsilon=0.0), x=x, scale=none, bias=none).gives(x, x=x, scale=none, bias=none)


def test_the_operator_is_taken_where_it_is_right(Graph):
    single = np.ones((2, D), np.float32)

    def operators(x, opset, epsilon):
        def both(x):
            return norm.rms_norm(x, epsilon=epsilon), norm.layer_norm(x, x[0], x[0], epsilon=epsilon)

        return Graph(both, opset, x=x).operators

    assert {"RMSNormalization", "LayerNormalization"} <= operators(single, 23, 1e-12)
    assert "LayerNormalization" in operators(single, 20, 1e-12)
    # 0/0 is NaN there; 1e-50 is 0 in float32.
    for x, epsilon in ((single, 0.0), (single, 1e-50), (np.ones((2, D)), 1e-12)):
        assert not {"RMSNormalization", "LayerNormalization"} & operators(x, 23, epsilon)


def test_what_does_not_fit_is_refused():
    x = np.ones((2, D))

    def made(name, epsilon=1e-12, **given):
        return build(partial(getattr(norm, name), epsilon=epsilon), given, opset=20)

    for epsilon in (-1e-9, np.nan, np.inf):
        with pytest.raises(DomainError, match="norm.rms_norm: expected a finite epsilon >= 0"):
            made("rms_norm", epsilon, x=x)
    with pytest.raises(ShapeError, match="norm.rms_norm: expected x of shape"):
        made("rms_norm", x=np.ones(()))
    with pytest.raises(DomainError, match="norm.rms_norm: x must be a floating value"):
        made("rms_norm", x=np.ones((2, D), bool))
    with pytest.raises(ShapeError, match="norm.rms_norm_scaled: expected scale of shape"):
        made("rms_norm_scaled", x=x, scale=np.ones(D - 1))
    with pytest.raises(ShapeError, match="norm.layer_norm: expected bias of shape"):
        made("layer_norm", x=x, scale=SCALE, bias=np.ones((1, D)))
