"""Elementwise activations and the positive feature map of linear attention.

silu(x) = x sigmoid(x),  gelu(x) = x Phi(x),  elu_plus_one(x) = elu(x) + 1

Specification: refimpl/ops/activation.py. Logistic functions are written with an exponential: ONNX Runtime's Sigmoid is
off by 2e-4 of the value at -8 and is 0 from about -18 on.
"""

import math

from export import check
from export.graph import Value, exp, function, maximum, minimum, op
from export.special import normal_distribution

# Coefficient of the cubic term in the tanh form of gelu; Hendrycks and Gimpel 2016.
GELU_CUBIC = 0.044715


@function
def relu(x: Value) -> Value:
    """The positive part of x."""
    return op("Relu", check.real("activation.relu", "x", x))


@function
def silu(x: Value) -> Value:
    """x times its own logistic function. Far below 0 the exponential is infinite, and the quotient 0."""
    return _gate(check.real("activation.silu", "x", x), x)


@function
def gelu_erf(x: Value) -> Value:
    """x times the standard normal distribution function."""
    return check.real("activation.gelu_erf", "x", x) * normal_distribution(x)


@function
def gelu_tanh(x: Value) -> Value:
    """The tanh approximation of gelu, as x sigmoid(2 z)."""
    x = check.real("activation.gelu_tanh", "x", x)
    return _gate(x, x * (x * x * GELU_CUBIC + 1) * (2 * math.sqrt(2 / math.pi)))


@function
def elu_plus_one(x: Value) -> Value:
    """elu(x) + 1."""
    x = check.real("activation.elu_plus_one", "x", x)
    return maximum(x, 0) + exp(minimum(x, 0))


def _gate(x: Value, z: Value) -> Value:
    return x / (exp(-z) + 1)
