"""One vector per sentence from one vector per token.

masked_mean: y = sum_n mask_n x_n / max(sum_n mask_n, 1)

Specification: refimpl/ops/pooling.py. The sum over tokens is a product with the mask, which reads x once.
"""

from export import check
from export.graph import Value, function, maximum, tanh


@function
def first(x: Value) -> Value:
    """The vector at position 0 of the array."""
    return _first("pooling.first", x)


@function
def masked_mean(x: Value, mask: Value) -> Value:
    """The mean of the unmasked tokens; zeros for a row without any."""
    return _masked_mean("pooling.masked_mean", "x", x, mask)


@function
def first_last_average(first: Value, last: Value, mask: Value) -> Value:
    """The average of the masked means of two blocks' outputs."""
    operation = "pooling.first_last_average"
    check.shape(operation, check.same(first.shape, last.shape), "equal shapes", first=first, last=last)
    return (_masked_mean(operation, "first", first, mask) + _masked_mean(operation, "last", last, mask)) * 0.5


@function
def pooler_linear(x: Value, kernel: Value, bias: Value) -> Value:
    """A dense layer on the vector at position 0; kernel is (in, out)."""
    return _pooler("pooling.pooler_linear", x, kernel, bias)


@function
def pooler_tanh(x: Value, kernel: Value, bias: Value) -> Value:
    """BERT's pooler: pooler_linear followed by tanh."""
    return tanh(_pooler("pooling.pooler_tanh", x, kernel, bias))


def _first(operation: str, x: Value) -> Value:
    check.real(operation, "x", x)
    check.shape(operation, x.ndim >= 2, "x of shape (..., n, d) with n >= 1", x=x)
    return x[..., 0, :]


def _masked_mean(operation: str, name: str, x: Value, mask: Value) -> Value:
    check.real(operation, name, x)
    check.boolean(operation, "mask", mask)
    fits = x.ndim >= 2 and check.same(mask.shape, x.shape[:-1])
    check.shape(operation, fits, f"{name} of shape (..., n, d) and mask of shape (..., n)", **{name: x, "mask": mask})
    visible = mask.cast(x.dtype)
    total = (visible[..., None, :] @ x)[..., 0, :]
    return total / maximum(visible.sum(-1, keepdims=True), 1)


def _pooler(operation: str, x: Value, kernel: Value, bias: Value) -> Value:
    x_0 = _first(operation, x)
    check.real(operation, "kernel", kernel)
    check.real(operation, "bias", bias)
    fits = kernel.ndim == 2 and bias.ndim == 1
    fits = fits and int(kernel.shape[0]) == int(x.shape[-1]) and int(bias.shape[0]) == int(kernel.shape[1])
    expected = "x of shape (..., n, d) with n >= 1, kernel (d, e) and bias (e,)"
    check.shape(operation, fits, expected, x=x, kernel=kernel, bias=bias)
    return x_0 @ kernel + bias
