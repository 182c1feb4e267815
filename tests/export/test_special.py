"""What runtimes lack in float64: a normal distribution function, and factors beside a matrix product."""

import mpmath
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.polynomial import chebyshev
from onnx.reference import ReferenceEvaluator
from scipy.special import ndtr

from export import special
from export.graph import build

WIDE = np.concatenate([np.linspace(-37, 9, 9201), [0.0, -0.0, 1e-300, -1e-300, 40.0, -1e5, 1e5, 1e308, -1e308]])


def run(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda arrays: made.run(None, arrays)[0]


def test_the_normal_distribution_is_relative_in_float64():
    model = build(special.normal_distribution, {"x": WIDE}, opset=20).model
    for found in (run(model)({"x": WIDE}), ReferenceEvaluator(model).run(None, {"x": WIDE})[0]):
        # exp(-x²/2) has the rounding of its argument.
        assert np.all(np.abs(found - ndtr(WIDE)) <= 2.0**-51 * (1 + np.minimum(np.abs(WIDE), 40) ** 2) * ndtr(WIDE))


def test_the_normal_distribution_is_absolute_in_float32():
    x = WIDE[np.abs(WIDE) < 1e38].astype(np.float32)
    found = run(build(special.normal_distribution, {"x": x}, opset=20).model)({"x": x})
    assert np.abs(found - ndtr(x.astype(np.float64))).max() < 2.0**-23


def test_the_coefficients_are_a_chebyshev_series():
    context = mpmath.MPContext()
    context.dps = 40

    def tail(y):
        t = special._SHIFT * (1 + y) / (1 - y)
        return (1 + t) * context.exp(t * t / 2) * context.erfc(t / context.sqrt(2)) / 2

    count = 48
    nodes = [context.cos(context.pi * (2 * j + 1) / (2 * count)) for j in range(count)]
    values = [tail(y) for y in nodes]
    series = np.empty(len(special._TAIL), object)
    for m in range(len(series)):
        terms = (v * context.cos(m * context.pi * (2 * j + 1) / (2 * count)) for j, v in enumerate(values))
        series[m] = (2 if m else 1) * sum(terms) / count
    assert [float(c) for c in chebyshev.cheb2poly(series)] == list(special._TAIL)


def test_onnx_runtime_has_no_erf_in_float64():
    """The day it has one, the series can go."""
    node = onnx.helper.make_node("Erf", ["x"], ["y"])
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, ["n"]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(Exception, match="Erf"):
        run(model)


@pytest.mark.parametrize("number", [0.3, -5 / 3, 1 / np.sqrt(7)])
@pytest.mark.parametrize("width", [1, 5])
def test_a_factor_beside_a_product_keeps_its_digits(number, width):
    """A plain factor becomes a float32 attribute of ONNX Runtime's product; a scaled one does not."""
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(3, width)), "y": rng.normal(size=(width, 7))}
    expected = number * (arrays["x"] @ arrays["y"])
    for call in (
        lambda x, y: special.scaled(x, number) @ y,
        lambda x, y: special.scaled(x @ y, number),
    ):
        assert np.allclose(run(build(call, arrays, opset=20).model)(arrays), expected, rtol=0, atol=1e-14)
    plain = run(build(lambda x, y: (x * number) @ y, arrays, opset=20).model)(arrays)
    assert np.abs(plain - expected).max() > 1e-10
