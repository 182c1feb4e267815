"""Rotary position embedding (RoPE): features are rotated in pairs by an angle proportional to the position.

    a' = a cos φ - b sin φ,   b' = a sin φ + b cos φ,   φ = p θ_i,   θ_i = base^(-2i/D)

Specification: refimpl/ops/rope.py. Angles, cosines and sines are float64 in every graph. Frequencies and orders come
from numbers alone: they are constants of the graph.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from export import check
from export.graph import Dim, Value, concat, constant, cos, function, op, opset, sin, stack, take

YARN_MAGNITUDE_SLOPE = 0.1
YARN_RAMP_FLOOR = 0.001

Order = Value | np.ndarray | Sequence[int]


class PermutedGau(NamedTuple):
    """The weights of a GAU whose shared features were permuted; the biases are None where none were given."""

    w_in: Value
    b_in: Value | None
    gamma: Value
    beta: Value | None


def frequencies(width: int, *, base: float) -> Value:
    """The rotation speeds base^(-2i/width) of the r = width/2 pairs."""
    return constant(_frequencies("rope.frequencies", width, base))


def frequencies_linear(width: int, *, base: float, factor: float) -> Value:
    """Position interpolation: every frequency divided by `factor`."""
    _check_positive("rope.frequencies_linear", factor=factor)
    return constant(_frequencies("rope.frequencies_linear", width, base) / factor)


def frequencies_ntk(width: int, *, base: float, factor: float) -> Value:
    """NTK-aware scaling: frequencies of the base that leaves the fastest pair and divides the slowest by `factor`."""
    return constant(_frequencies_ntk("rope.frequencies_ntk", width, base, factor))


def frequencies_dynamic_ntk(width: int, *, base: float, factor: float, length: int, max_length: int) -> Value:
    """NTK-aware scaling by a factor that grows with the length beyond max_length."""
    operation = "rope.frequencies_dynamic_ntk"
    _check_positive(operation, factor=factor, length=length, max_length=max_length)
    grown = factor * length / max_length - (factor - 1.0) if length > max_length else 1.0
    return constant(_frequencies_ntk(operation, width, base, grown))


def frequencies_yarn(
    width: int, *, base: float, factor: float, original_length: int, beta_fast: float, beta_slow: float
) -> Value:
    """YaRN: fast pairs keep their frequency, slow ones are divided by `factor`, a ramp of indices lies between."""
    operation = "rope.frequencies_yarn"
    _check_positive(operation, factor=factor, original_length=original_length, beta_fast=beta_fast, beta_slow=beta_slow)
    width = _even(operation, width)
    theta = _frequencies(operation, width, base)
    check.domain(operation, base > 1, "base > 1", base=base)
    check.domain(operation, beta_fast >= beta_slow, "beta_fast >= beta_slow", beta_fast=beta_fast, beta_slow=beta_slow)

    def turning(turns: float) -> float:
        """The index of the pair that turns so often within the original length."""
        return width / 2 * math.log(original_length / (2 * math.pi * turns)) / math.log(base)

    first, last = max(math.floor(turning(beta_fast)), 0), min(math.ceil(turning(beta_slow)), width - 1)
    slow = np.clip((np.arange(width // 2) - first) / max(last - first, YARN_RAMP_FLOOR), 0, 1)
    return constant(theta * (1 - slow) + theta / factor * slow)


def yarn_magnitude(factor: float) -> float:
    """What YaRN multiplies cos and sin by: 0.1 ln factor + 1 for factor > 1, else 1."""
    _check_positive("rope.yarn_magnitude", factor=factor)
    return YARN_MAGNITUDE_SLOPE * math.log(factor) + 1.0 if factor > 1 else 1.0


@function
def angles(positions: Value, frequencies: Value) -> Value:
    """The angle p θ_i of every pair at every position, in float64."""
    if positions.dtype.kind != "f":
        check.integer("rope.angles", "positions", positions)
    check.real("rope.angles", "frequencies", frequencies)
    check.shape("rope.angles", frequencies.ndim == 1, "frequencies of shape (r,)", frequencies=frequencies)
    return positions.cast(np.float64)[..., None] * frequencies.cast(np.float64)


@function
def rotate_interleaved(x: Value, angles: Value) -> Value:
    """Rotates the adjacent pairs (x_0, x_1), (x_2, x_3), ... counter-clockwise by `angles`."""
    _check_rotation("rope.rotate_interleaved", x, angles)
    if _has_operator(x, angles):
        return _by_operator(x, angles, interleaved=1)
    pairs = _rotated(x[..., 0::2], x[..., 1::2], angles)
    return stack(pairs, axis=-1).regroup(2, int(x.shape[-1]))


@function
def rotate_half_split(x: Value, angles: Value) -> Value:
    """Rotates the pairs (x_i, x_(i+d/2)) counter-clockwise by `angles`."""
    _check_rotation("rope.rotate_half_split", x, angles)
    if _has_operator(x, angles):
        return _by_operator(x, angles, interleaved=0)
    r = int(angles.shape[-1])
    return concat(_rotated(x[..., :r], x[..., r:], angles), axis=-1)


@function
def rotate_contiguous(x: Value, angles: Value, rotate: Callable[..., Value]) -> Value:
    """Partial rotation of a contiguous block: `rotate` acts on the first 2r features, the rest passes through."""
    d, r = _widths("rope.rotate_contiguous", x, angles)
    check.shape("rope.rotate_contiguous", 2 * r <= d, "x with at least 2r features", x=x, angles=angles)
    return concat([rotate(x[..., : 2 * r], angles), x[..., 2 * r :]], axis=-1)


@function
def rotate_proportional(x: Value, angles: Value) -> Value:
    """Partial rotation of the r fastest pairs of the half-split layout of the whole head."""
    operation = "rope.rotate_proportional"
    d, r = _widths(operation, x, angles)
    check.shape(operation, d % 2 == 0, "an even rotary width", x=x, angles=angles)
    check.shape(operation, 2 * r <= d, "angles for at most d/2 pairs", x=x, angles=angles)
    _check_tokens(operation, x, angles)
    a, b = _rotated(x[..., :r], x[..., d // 2 : d // 2 + r], angles)
    return concat([a, x[..., r : d // 2], b, x[..., d // 2 + r :]], axis=-1)


def half_split_order(width: int) -> Value:
    """The index array that takes the interleaved layout to the half-split one: (0, 2, 4, ..., 1, 3, 5, ...)."""
    width = _even("rope.half_split_order", width)
    return constant(np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)]))


def interleaved_order(width: int) -> Value:
    """The index array that takes the half-split layout to the interleaved one: (0, width/2, 1, width/2 + 1, ...)."""
    width = _even("rope.interleaved_order", width)
    i = np.arange(width)
    return constant(i // 2 + i % 2 * (width // 2))


@function
def permute_projection(weight: Value, *, heads: int, order: Order) -> Value:
    """A query or key projection (weight or bias) whose output features are taken in `order` within every head."""
    operation = "rope.permute_projection"
    check.real(operation, "weight", weight)
    check.domain(operation, heads >= 1, "heads >= 1", heads=heads)
    features = int(weight.shape[-1]) if weight.ndim else -1
    check.shape(operation, features % heads == 0 <= features, f"features in {heads} equal heads", weight=weight)
    width = features // heads
    index = _head_index(operation, order, width)
    # Column h · width + j of the result comes from column h · width + index_j.
    return take(weight, (constant(np.arange(heads)[:, None] * width) + index).reshape(features), axis=-1)


@function
def permute_gau(
    w_in: Value, b_in: Value | None, gamma: Value, beta: Value | None, *, s: int, order: Order
) -> PermutedGau:
    """The weights of a GAU whose shared s features, the last s columns of its input projection, are in `order`."""
    operation = "rope.permute_gau"
    index = _head_index(operation, order, s)
    check.shape(operation, gamma.shape[-1:] == (s,), f"gamma with {s} features", gamma=gamma)
    for name, bias, weight in (("b_in", b_in, w_in.shape[-1:]), ("beta", beta, gamma.shape)):
        fits = bias is None or bias.shape == weight
        check.shape(operation, fits, f"{name} of shape {weight}", received=bias)

    def permuted(name: str, values: Value) -> Value:
        before = int(check.real(operation, name, values).shape[-1]) - s if values.ndim else -1
        check.shape(operation, before >= 0, f"{name} with at least {s} features", received=values)
        return take(values, concat([constant(np.arange(before)), index + before], axis=0), axis=-1)

    return PermutedGau(
        permuted("w_in", w_in),
        None if b_in is None else permuted("b_in", b_in),
        permuted("gamma", gamma),
        None if beta is None else permuted("beta", beta),
    )


def _frequencies(operation: str, width: int, base: float) -> np.ndarray:
    width = _even(operation, width)
    _check_positive(operation, base=base)
    return np.power(float(base), np.arange(width // 2) * (-2.0 / max(width, 1)))


def _frequencies_ntk(operation: str, width: int, base: float, factor: float) -> np.ndarray:
    width = _even(operation, width)
    _check_positive(operation, base=base, factor=factor)
    check.domain(operation, width != 2, "a rotary width of 0 or at least 4", width=width)
    return _frequencies(operation, width, base * factor ** (width / (width - 2)))


def _rotated(a: Value, b: Value, angles: Value) -> tuple[Value, Value]:
    across, along = sin(angles.cast(np.float64)).cast(a.dtype), cos(angles.cast(np.float64)).cast(a.dtype)
    return a * along - b * across, a * across + b * along


def _has_operator(x: Value, angles: Value) -> bool:
    """RotaryEmbedding takes tokens (b, n, features) and one row of cosines for each token, for all heads alike."""
    if opset() < 23 or x.dtype != np.float32:
        return False
    one_head_axis = angles.ndim in (3, 4) and isinstance(angles.shape[-2], int) and angles.shape[-2] == 1
    return one_head_axis if x.ndim == 4 else x.ndim == 3 and angles.ndim in (2, 3)


def _by_operator(x: Value, angles: Value, *, interleaved: int) -> Value:
    heads = int(x.shape[-2]) if x.ndim == 4 else 1
    options: dict[str, Any] = {"interleaved": interleaved, "num_heads": heads}
    angles = angles.cast(np.float64)
    per_token = angles[..., 0, :] if x.ndim == 4 else angles
    # Angles of one sequence are repeated for the batch, those of one token for the sequence.
    tokens = op("Shape", x, start=0, end=2, dtype=np.int64, shape=(2,))
    sizes = concat([tokens, constant(np.array([1]))], axis=0)
    shape = (*x.shape[:2], angles.shape[-1])
    tables = [op("Expand", t.cast(x.dtype), sizes, shape=shape) for t in (cos(per_token), sin(per_token))]
    if x.ndim == 3:
        return op("RotaryEmbedding", x, *tables, **options)
    d = int(x.shape[-1])
    return op("RotaryEmbedding", x.regroup(2, heads * d), *tables, **options).regroup(1, heads, d)


def _widths(operation: str, x: Value, angles: Value) -> tuple[int, int]:
    check.real(operation, "x", x)
    check.real(operation, "angles", angles)
    check.shape(operation, min(x.ndim, angles.ndim) >= 1, "x of shape (..., d), angles (..., r)", x=x, angles=angles)
    return int(x.shape[-1]), int(angles.shape[-1])


def _check_rotation(operation: str, x: Value, angles: Value) -> None:
    d, r = _widths(operation, x, angles)
    check.shape(operation, d % 2 == 0, "an even rotary width", x=x, angles=angles)
    check.shape(operation, 2 * r == d, "angles for d/2 pairs", x=x, angles=angles)
    _check_tokens(operation, x, angles)


def _check_tokens(operation: str, x: Value, angles: Value) -> None:
    expected = "angles that broadcast to x[..., :r]; insert the head axis, angles[..., None, :]"
    check.shape(operation, check.broadcasts(angles.shape[:-1], x.shape[:-1]), expected, x=x, angles=angles)


def _head_index(operation: str, order: Order, width: int) -> Value:
    """`order`, followed by the features that stay where they are."""
    if isinstance(order, Value):
        order = check.integer(operation, "order", order)
        fits, length = order.ndim == 1, int(order.shape[0]) if order.ndim else 0
    else:
        whole = np.asarray(order)
        check.domain(operation, whole.dtype.kind in "iu", "an order of integers", dtype=str(whole.dtype))
        fits, length = whole.ndim == 1, whole.size
        permutation = np.array_equal(np.sort(whole.ravel()), np.arange(length))
        check.domain(operation, permutation, f"a permutation of 0 ... {length - 1}", order=whole.tolist())
        order = constant(whole.astype(np.int64))
    check.shape(operation, fits and length <= width, f"an order of at most {width} indices", order=order)
    return concat([order, constant(np.arange(length, width))], axis=0)


def _even(operation: str, width: int) -> int:
    """`width` as a number: a size of a value is one as well, and is fixed by this."""
    even = isinstance(width, (int, np.integer, Dim)) and int(width) >= 0 and int(width) % 2 == 0
    check.domain(operation, even, "an even rotary width", width=width)
    return int(width)


def _check_positive(operation: str, **numbers: float) -> None:
    for name, number in numbers.items():
        check.domain(operation, 0 < number < math.inf, f"{name} > 0", **{name: number})
