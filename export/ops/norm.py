"""Normalisation of the last axis by its standard deviation or by its root mean square.

layer_norm: y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias
rms_norm:   y = x / sqrt(mean(x^2) + epsilon)

Specification: refimpl/ops/norm.py. In float32 and where epsilon is not 0 there, these are ONNX's LayerNormalization and
from opset 23 on its RMSNormalization, whose epsilon is a float32 and whose 0/0 is NaN. Otherwise they are written out,
with products for squares: ONNX Runtime replaces Pow, ReduceMean, Add, Sqrt, Div, Mul by a kernel of its own, which in
float64 takes 1e-5 for every epsilon.
"""

import math

import numpy as np

from export import check
from export.graph import Value, constant, function, op, opset, sqrt, where

# Largest magnitude of the specification; in float32 a square overflows beyond 1.8e19 already.
LARGEST = 1e150


@function
def rms_norm(x: Value, *, epsilon: float) -> Value:
    """Each row divided by its root mean square; a row of zeros gives zeros when epsilon = 0."""
    return _rms_norm(_row("norm.rms_norm", x, epsilon), None, epsilon)


@function
def rms_norm_scaled(x: Value, scale: Value, *, epsilon: float) -> Value:
    """rms_norm followed by a trained scale per feature."""
    x = _row("norm.rms_norm_scaled", x, epsilon)
    return _rms_norm(x, _feature("norm.rms_norm_scaled", "scale", scale, x), epsilon)


@function
def layer_norm(x: Value, scale: Value, bias: Value, *, epsilon: float) -> Value:
    """Each row centred, divided by its standard deviation, then scaled and shifted per feature.

    A constant row gives bias; where the operator is taken, as exactly as it forms the mean (ONNX Runtime: exactly).
    """
    x = _row("norm.layer_norm", x, epsilon)
    scale = _feature("norm.layer_norm", "scale", scale, x)
    bias = _feature("norm.layer_norm", "bias", bias, x)
    if _has_operator(x, epsilon):
        return op("LayerNormalization", x, scale, bias, epsilon=epsilon)
    # The rounded mean of equal numbers need not equal them.
    varies = x.max(-1, keepdims=True) > x.min(-1, keepdims=True)
    return _over_root((x - x.mean(-1, keepdims=True)) * varies.cast(x.dtype), epsilon) * scale + bias


def _row(operation: str, x: Value, epsilon: float) -> Value:
    check.real(operation, "x", x)
    check.shape(operation, x.ndim >= 1, "x of shape (..., d)", x=x)
    check.domain(operation, 0 <= epsilon < math.inf, "a finite epsilon >= 0", epsilon=epsilon)
    return x


def _feature(operation: str, name: str, values: Value, x: Value) -> Value:
    check.real(operation, name, values)
    check.shape(operation, values.shape == x.shape[-1:], f"{name} of shape (d,)", x=x, **{name: values})
    return values


def _rms_norm(x: Value, scale: Value | None, epsilon: float) -> Value:
    if opset() >= 23 and _has_operator(x, epsilon):
        weight = constant(np.ones(int(x.shape[-1]), x.dtype)) if scale is None else scale
        return op("RMSNormalization", x, weight, epsilon=epsilon)
    y = _over_root(x, epsilon)
    return y if scale is None else y * scale


def _counts(x: Value, epsilon: float) -> bool:
    """Whether the format of x can tell epsilon from 0."""
    return bool(x.dtype.type(epsilon) > 0)


def _has_operator(x: Value, epsilon: float) -> bool:
    return x.dtype == np.float32 and _counts(x, epsilon) and int(x.shape[-1]) > 0


def _over_root(x: Value, epsilon: float) -> Value:
    root = sqrt((x * x).mean(-1, keepdims=True) + epsilon)
    if _counts(x, epsilon):
        return x / root
    # 0/0 counts as 0: x is 0 where the root is.
    return x / where(root > 0, root, 1)
