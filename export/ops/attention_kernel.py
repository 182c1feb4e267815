"""An attention kernel turns the scores of every query against every key into weights, and hides the masked keys.

    weights = kernel(scores, mask),   weights_ij = 0 wherever mask_ij is False

Specification: refimpl/ops/attention_kernel.py. A mask is cast or turned into a bound in its own size, and meets the
scores by broadcasting; without a mask there are no nodes for it.
"""

import math

import numpy as np

from export import check
from export.graph import Value, constant, function, log, maximum, minimum, op, sqrt, where
from export.special import normal_distribution

# softmax_plus equals softmax on rows of this many visible keys.
SOFTMAX_PLUS_LENGTH = 512
# Mean and standard deviation of the Laplace kernel (arXiv:2209.10655).
LAPLACE_MEAN = math.sqrt(1 / 2)
LAPLACE_DEVIATION = math.sqrt(1 / (4 * math.pi))


@function
def visible_lengths(scores: Value, mask: Value | None) -> Value:
    """The number of keys visible to every row, as int64 of shape (..., 1)."""
    _check("attention_kernel.visible_lengths", scores, mask)
    rows = (scores.size(axis) for axis in range(scores.ndim - 1))
    return _lengths(scores, mask, np.int64).broadcast_to(*rows, 1)


@function
def softmax(scores: Value, mask: Value | None) -> Value:
    """Exponentials normalised over the visible keys of a row; a row without one is all zeros."""
    _check("attention_kernel.softmax", scores, mask)
    return _softmax(scores, mask)


@function
def softmax_plus(scores: Value, mask: Value | None, *, n_min: int) -> Value:
    """Entropy-invariant softmax: scores grow with the logarithm of the row's own number of visible keys."""
    _check("attention_kernel.softmax_plus", scores, mask)
    check.domain("attention_kernel.softmax_plus", n_min >= 1, "n_min >= 1", n_min=n_min)
    factor = log(maximum(_lengths(scores, mask, np.float64), n_min)) * (1 / math.log(SOFTMAX_PLUS_LENGTH))
    return _softmax(scores * factor.cast(scores.dtype), mask)


@function
def squared_relu_visible(scores: Value, mask: Value | None) -> Value:
    """Squared ReLU divided by the number of keys visible to the row."""
    _check("attention_kernel.squared_relu_visible", scores, mask)
    return _squared_relu(scores, mask, maximum(_lengths(scores, mask, scores.dtype), 1))


@function
def squared_relu_array(scores: Value, mask: Value | None) -> Value:
    """Squared ReLU divided by the length of the key axis, padding included."""
    _check("attention_kernel.squared_relu_array", scores, mask)
    return _squared_relu(scores, mask, scores.size(-1).cast(scores.dtype))


@function
def squared_relu_constant(scores: Value, mask: Value | None, *, length: int) -> Value:
    """Squared ReLU divided by one constant, the same for training and use."""
    _check("attention_kernel.squared_relu_constant", scores, mask)
    check.domain("attention_kernel.squared_relu_constant", length >= 1, "length >= 1", length=length)
    return _squared_relu(scores, mask, constant(length, scores.dtype))


@function
def laplace(scores: Value, mask: Value | None) -> Value:
    """The distribution function of a normal law, a bounded stand-in for the squared ReLU."""
    _check("attention_kernel.laplace", scores, mask)
    weights = normal_distribution((scores - LAPLACE_MEAN) * (1 / LAPLACE_DEVIATION))
    return weights if mask is None else weights * mask.cast(scores.dtype)


def _check(operation: str, scores: Value, mask: Value | None) -> None:
    check.real(operation, "scores", scores)
    check.shape(operation, scores.ndim >= 1, "scores with a key axis, (..., m)", scores=scores)
    if mask is not None:
        check.boolean(operation, "mask", mask)
        expected = "a mask that broadcasts to the scores"
        check.shape(operation, check.broadcasts(mask.shape, scores.shape), expected, scores=scores, mask=mask)


def _lengths(scores: Value, mask: Value | None, dtype: type | np.dtype) -> Value:
    """The number of visible keys, in the rows of the mask: (..., 1), or a scalar without a mask."""
    m = scores.size(-1)
    if mask is None or mask.ndim == 0:
        return m.cast(dtype) if mask is None else m.cast(dtype) * mask.cast(dtype)
    # A mask of one key axis stands for all m keys. The maximum is for m = 0.
    stands_for = m / maximum(mask.size(-1), 1)
    return mask.cast(dtype).sum(-1, keepdims=True) * stands_for.cast(dtype)


def _softmax(scores: Value, mask: Value | None) -> Value:
    if mask is None:
        return op("Softmax", scores, axis=-1)
    # The lowest number, not -inf: of a row without a visible key it makes no NaN, and the last product zeros.
    largest = np.finfo(scores.dtype).max
    bound = where(mask, constant(largest, scores.dtype), -largest)
    return op("Softmax", minimum(scores, bound), axis=-1) * mask.cast(scores.dtype)


def _squared_relu(scores: Value, mask: Value | None, length: Value) -> Value:
    # The mask and the length are one factor before the square, so that no masked score can overflow.
    visible = constant(1, scores.dtype) if mask is None else mask.cast(scores.dtype)
    positive = op("Relu", scores) * (visible / sqrt(length))
    return positive * positive
