"""torchimpl.ops.activation: values from tables, slopes, tails, and 16 bits."""

import pytest
import torch

from refimpl.check import DomainError
from torchimpl.ops import activation

ALL = (activation.relu, activation.silu, activation.gelu_erf, activation.gelu_tanh, activation.elu_plus_one)

# From 30-digit arithmetic.
VALUES = [
    (activation.relu, [-2.0, 0.0, 3.5], [0.0, 0.0, 3.5]),
    (activation.silu, [1.0, -1.0, -30.0, 1000.0, -1000.0],
     [0.731058578630004879, -0.268941421369995121, -2.80728689065178969e-12, 1000.0, 0.0]),
    (activation.gelu_erf, [1.0, -2.7, -6.0, 40.0],
     [0.841344746068542949, -0.00936082926820980494, -5.91952587022618884e-09, 40.0]),
    (activation.gelu_tanh, [1.0, -2.7, 1000.0, -1000.0], [0.841191990608276705, -0.00888759463946790506, 1000.0, 0.0]),
    (activation.elu_plus_one, [2.5, 0.0, -1.0, -10.0, -50.0],
     [3.5, 1.0, 0.367879441171442322, 4.53999297624848515e-05, 1.92874984796391778e-22]),
]  # fmt: skip


@pytest.mark.parametrize("function, x, y", VALUES)
def test_values(function, x, y) -> None:
    found = function(torch.tensor(x, dtype=torch.float64))
    # torch's tanh form of gelu cancels in its tail: it is right against abs(x).
    absolute = 1e-15 if function is activation.gelu_tanh else 0.0
    torch.testing.assert_close(found, torch.tensor(y, dtype=torch.float64), rtol=2e-14, atol=absolute)


@pytest.mark.parametrize("function", ALL)
def test_gradients(function) -> None:
    x = torch.tensor([[-31.0, -3.0, -0.7], [0.4, 2.9, 1e3]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)


def test_slope_at_zero() -> None:
    slopes = {activation.relu: 0.0, activation.silu: 0.5, activation.gelu_erf: 0.5, activation.elu_plus_one: 1.0}
    for function, slope in slopes.items():
        x = torch.zeros(3, requires_grad=True)
        assert torch.equal(torch.autograd.grad(function(x).sum(), x)[0], torch.full((3,), slope))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_round_once(dtype) -> None:
    x = torch.linspace(-8, 8, 101).to(dtype)
    for function in ALL:
        found = function(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, function(x.double()).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
    # Its cube leaves float16 a long way.
    assert activation.gelu_tanh(torch.tensor(1000.0, dtype=dtype)) == 1000.0


@pytest.mark.parametrize("function", ALL)
def test_refuses_what_is_not_floating(function) -> None:
    for x in (torch.arange(3), torch.ones(2, dtype=torch.bool), 1.0):
        with pytest.raises(DomainError, match=f"activation.{function.__name__}: x must be a floating tensor"):
            function(x)


def test_compiled() -> None:
    compiled = torch.compile(activation.gelu_erf, fullgraph=True, dynamic=True)
    for size in (5, 7):
        x = torch.linspace(-6, 6, size)
        torch.testing.assert_close(compiled(x), activation.gelu_erf(x), rtol=1e-5, atol=1e-6)


def test_relu_has_its_own_slope_when_compiled() -> None:
    x = torch.tensor([float("-inf"), -2.0, -0.0, 0.0, 1e-40, 3.0, float("inf"), float("nan")])
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for function in (activation.relu, torch.compile(activation.relu, fullgraph=True)):
            given = x.to(dtype).requires_grad_()
            y = function(given)
            (slope,) = torch.autograd.grad(y, given, torch.full_like(y, 5.0))
            found.append((y.detach(), slope))
        (y, slope), (compiled_y, compiled_slope) = found
        torch.testing.assert_close(compiled_y, y, rtol=0, atol=0, equal_nan=True)
        # Where x is not a number neither is the slope, or it is the gradient: torch's choice.
        torch.testing.assert_close(compiled_slope[:-1], slope[:-1], rtol=0, atol=0)
