"""What ONNX or its runtimes lack in float64."""

import math

import numpy as np

from export.graph import Value, exp, minimum, op, where

# (1 + t) exp(t²/2) Φ(-t) for t >= 0 as a polynomial in (t - 6)/(t + 6), the constant term first: its Chebyshev series,
# cut after 24 terms, where the rest sums up to less than 2e-17.
_SHIFT = 6.0
_TAIL = (
    0.45345520027112796, -0.08502536230577078, 0.03981142456242622, -0.004373386779587463, -0.016141517332019992,
    0.02259246706261421, -0.019766479223419838, 0.013246864156245519, -0.007059819386114566, 0.0029356555021721998,
    -0.0008689948765084577, 0.0001194897177980113, 3.779571503282202e-05, -2.635351872406333e-05,
    4.410330294912029e-06, 1.7838489644739712e-06, -9.96080076103636e-07, -1.9386236992692282e-11,
    1.2855300997957524e-07, -2.0980344395760243e-08, -1.3216248494004574e-08, 3.858154154095681e-09,
    8.832119066106692e-10, -3.4141929289232747e-10,
)  # fmt: skip


def normal_distribution(x: Value) -> Value:
    """Φ(x): in float32 by ONNX's Erf, absolute below 0; in float64, where runtimes have no Erf, relative everywhere."""
    if x.dtype == np.float32:
        return (op("Erf", x * math.sqrt(0.5)) + 1) * 0.5
    # From 39 on the tail is below the smallest double; infinity would make the quotient NaN.
    t = minimum(abs(x), 40)
    place = (t - _SHIFT) / (t + _SHIFT)
    series = place * _TAIL[-1] + _TAIL[-2]
    for coefficient in _TAIL[-3::-1]:
        series = series * place + coefficient
    below = exp(t * t * -0.5) * series / (t + 1)
    return where(x < 0, below, 1 - below)


def scaled(x: Value, number: float) -> Value:
    """x times a number, with full precision beside a MatMul as well.

    ONNX Runtime makes a constant factor next to a MatMul an attribute of its own product: free of cost, but a float32.
    In float64 a negation stands on either side, and it leaves the factor alone.
    """
    if x.dtype == np.float32:
        return x * number
    return -(-x * number)
