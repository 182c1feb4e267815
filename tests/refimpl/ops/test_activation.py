"""Expected values come from mpmath at 40 digits, from PyTorch, or are computed by hand."""

from inspect import unwrap

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.check import DomainError
from refimpl.ops import activation

POINTS = [-700.0, -40.0, -10.0, -5.75, -2.7, -1.0, -1e-3, -1e-300, 0.0, 1e-300, 1e-3, 0.5, 1.0, 2.7, 6.0, 40.0, 700.0]
ALL = [activation.relu, activation.silu, activation.gelu_erf, activation.gelu_tanh, activation.elu_plus_one]


def _exact(name: str, x: float) -> mpmath.mpf:
    x = mpmath.mpf(x)
    if name == "silu":
        return x / (1 + mpmath.exp(-x))
    if name == "gelu_erf":
        return x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2
    if name == "gelu_tanh":
        cubic = mpmath.mpf(44715) / 10**6
        return x * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + cubic * x**3))) / 2
    assert name == "elu_plus_one"
    return x + 1 if x > 0 else mpmath.exp(x)


@pytest.mark.parametrize("name", ["silu", "gelu_erf", "gelu_tanh", "elu_plus_one"])
def test_values_keep_relative_accuracy_on_the_whole_axis(name: str) -> None:
    # gelu_tanh of -2.7 and of -5.75 are the result of an exponential of a rounded number as large as -130.
    bound = 4e-14 if name.startswith("gelu") else 1e-15
    out = getattr(activation, name)(np.array(POINTS))
    # 1 + tanh(z) needs digits beyond those that cancel.
    with mpmath.workdps(900):
        for x, y in zip(POINTS, out, strict=True):
            expected = _exact(name, x)
            assert abs(mpmath.mpf(float(y)) - expected) <= bound * abs(expected) + mpmath.mpf("1e-307"), (name, x)


def test_literal_values() -> None:
    assert activation.relu(np.array([-3.0, 0.0, 2.5])).tolist() == [0.0, 0.0, 2.5]
    np.testing.assert_allclose(activation.silu(np.array([1.0, -30.0])), [0.7310585786300049, -2.8072868906520526e-12])
    np.testing.assert_allclose(activation.gelu_erf(np.array([1.0, -10.0])), [0.8413447460685429, -7.61985302416e-23])
    np.testing.assert_allclose(activation.gelu_tanh(np.array([1.0])), [0.8411919906082768])
    assert activation.elu_plus_one(np.array([0.0, 2.0])).tolist() == [1.0, 3.0]


def test_the_two_forms_of_gelu_differ_by_473e_6() -> None:
    x = np.linspace(-6, 6, 24001)
    gap = np.abs(activation.gelu_erf(x) - activation.gelu_tanh(x))
    assert gap.max() == pytest.approx(4.73e-4, rel=2e-3)
    assert abs(x[gap.argmax()]) == pytest.approx(2.70, abs=5e-3)


def test_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch")
    x = np.linspace(-8, 8, 4001)
    functional, t = torch.nn.functional, torch.from_numpy(x)
    pairs = [
        (activation.relu, functional.relu(t)),
        (activation.silu, functional.silu(t)),
        (activation.gelu_erf, functional.gelu(t)),
        (activation.gelu_tanh, functional.gelu(t, approximate="tanh")),
        (activation.elu_plus_one, functional.elu(t) + 1),
    ]
    for function, expected in pairs:
        np.testing.assert_allclose(function(x), expected.numpy(), rtol=0, atol=2e-15, err_msg=function.__name__)


@pytest.mark.parametrize("name", ["silu", "gelu_erf", "gelu_tanh", "relu"])
@given(x=st.floats(-1e6, 1e6))
def test_reflection(name: str, x: float) -> None:
    function = getattr(activation, name)
    difference = function(np.array([x])) - function(np.array([-x]))
    # Half of the least subnormal number is lost.
    np.testing.assert_allclose(difference, [x], rtol=1e-15, atol=5e-324)


@given(x=st.floats(-1e4, 1e4), step=st.floats(1e-6, 1.0))
def test_elu_plus_one_is_positive_and_increasing(x: float, step: float) -> None:
    low, high = activation.elu_plus_one(np.array([x, x + step]))
    assert low <= high
    assert low > 0 or x < -745


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("function", ALL)
def test_extreme_input_neither_overflows_nor_warns(function) -> None:
    out = function(np.array([-1e308, -1e200, -1000.0, 1000.0, 1e200, 1e308]))
    assert (np.abs(out[:3]) == 0).all()
    assert out[3:].tolist() == [1000.0 + (function is activation.elu_plus_one), 1e200, 1e308]


@pytest.mark.parametrize("function", ALL)
def test_shape_dtype_and_argument_are_kept(function) -> None:
    x = np.linspace(-2, 2, 2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)
    before = x.copy()
    out = function(x)
    assert out.shape == x.shape and out.dtype == np.float64
    assert (x == before).all()
    assert function(np.zeros((3, 0, 2))).shape == (3, 0, 2)
    assert unwrap(function)([1, 2]).dtype == np.float64


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1j])
def test_refuses_what_is_no_finite_real_number(function, bad: complex) -> None:
    with pytest.raises(DomainError, match=f"activation.{function.__name__}: x must"):
        function(np.array([1.0, bad]))
