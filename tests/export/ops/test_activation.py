"""Graphs of activations: one for every size, tails that a runtime's Sigmoid loses, forms that differ."""

import math

import numpy as np
import pytest

from export.graph import build, sigmoid
from export.ops import activation
from refimpl.check import DomainError
from refimpl.ops import activation as spec

NAMES = ("relu", "silu", "gelu_erf", "gelu_tanh", "elu_plus_one")
X = np.concatenate([np.linspace(-40, 40, 641), [0.0, -0.0, 1e-30, -1e-30, 1000.0, -1000.0]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_tails(Graph, name, dtype):
    x = X.astype(dtype)
    graph = Graph(getattr(activation, name), x=x)
    assert graph.fixed == {}
    expected = getattr(spec, name)(x)
    graph.gives(expected, x=x)
    if (name, dtype) != ("gelu_erf", np.float32):
        # Relative everywhere, but for the rounding of an exponential's argument, and for what is below the format.
        size = np.abs(X)
        argument = {"gelu_erf": X**2 / 2, "gelu_tanh": 2 * size + 0.08 * size**3}.get(name, size)
        allowed = 2 * np.finfo(dtype).eps * (2 + argument) * np.abs(expected) + np.finfo(dtype).tiny
        assert np.all(np.abs(graph(x=x) - expected) <= allowed)


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_every_size(Graph, name):
    graph = Graph(getattr(activation, name), x=np.zeros((2, 3)))
    for shape in ((0, 3), (1, 1), (1, 7), (5, 2), (3, 0)):
        x = np.random.default_rng(0).normal(size=shape) * 3
        graph.gives(getattr(spec, name)(x), x=x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_literal_values(Graph, dtype):
    def ran(name, *values):
        x = np.array(values, dtype)
        return Graph(getattr(activation, name), x=x)(x=x).tolist()

    assert ran("relu", -3.0, 0.0, 2.5) == [0.0, 0.0, 2.5]
    assert ran("silu", 1000.0, -1000.0, 0.0) == [1000.0, 0.0, 0.0]
    assert ran("silu", -30.0) == pytest.approx([-30 * math.exp(-30)], rel=1e-6)
    assert ran("silu", math.log(3)) == pytest.approx([0.75 * math.log(3)], rel=1e-6)
    assert ran("elu_plus_one", -math.log(2), 0.0, 3.0) == pytest.approx([0.5, 1.0, 4.0], rel=1e-6)
    # The two forms of gelu part by 4.7e-4 here.
    assert ran("gelu_erf", -2.7) == pytest.approx([-0.0093608096], abs=2e-7)
    assert ran("gelu_tanh", -2.7) == pytest.approx([-0.0088875150], abs=2e-7)


def test_a_runtimes_sigmoid_loses_the_tail(session):
    """Why silu is written with an exponential."""
    x = np.array([-30.0], np.float32)
    written = session(build(lambda x: x * sigmoid(x), {"x": x}, opset=20).model)({"x": x})[0]
    assert written[0] == 0
    ours = session(build(activation.silu, {"x": x}, opset=20).model)({"x": x})[0]
    assert ours[0] == pytest.approx(-2.8072870e-12, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_are_refused(name):
    with pytest.raises(DomainError, match=f"activation.{name}: x must be a floating value, received dtype int64"):
        build(getattr(activation, name), {"x": np.arange(3)}, opset=20)
