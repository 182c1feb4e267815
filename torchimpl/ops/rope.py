"""Rotary position embedding (RoPE): features are rotated in pairs by an angle proportional to the position.

    a' = a cos φ - b sin φ,   b' = a sin φ + b cos φ,   φ = p θ_i,   θ_i = base^(-2i/D)

Specification: refimpl/ops/rope.py. Angles, their cosines and sines are formed in float64, on devices without float64
(mps) in float32; the rotation itself in float32 for 16-bit features, and rounded once.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from torchimpl import check

YARN_MAGNITUDE_SLOPE = 0.1
YARN_RAMP_FLOOR = 0.001


class PermutedGau(NamedTuple):
    """The weights of a GAU whose shared features were permuted; the biases are None where none were given."""

    w_in: Float[Tensor, "d f"]
    b_in: Float[Tensor, " f"] | None
    gamma: Float[Tensor, "*k s"]
    beta: Float[Tensor, "*k s"] | None


def frequencies(width: int, *, base: float) -> Float[Tensor, " r"]:
    """The rotation speeds base^(-2i/width) of the r = width/2 pairs, a float64 tensor on the CPU.

    Raises: DomainError for an odd or negative width or a base that is not positive.
    """
    _check_width_and_base("rope.frequencies", width, base)
    return base ** (-2.0 * torch.arange(width // 2, dtype=torch.float64) / width)


def frequencies_linear(width: int, *, base: float, factor: float) -> Float[Tensor, " r"]:
    """Position interpolation: every frequency divided by `factor`.

    Raises: DomainError as `frequencies`, and for a factor that is not positive.
    """
    _check_positive("rope.frequencies_linear", factor=factor)
    return frequencies(width, base=base) / factor


def frequencies_ntk(width: int, *, base: float, factor: float) -> Float[Tensor, " r"]:
    """NTK-aware scaling: frequencies of the base that leaves the fastest pair and divides the slowest by `factor`.

    Raises: DomainError as `frequencies`, for a factor that is not positive, and for width 2.
    """
    _check_width_and_base("rope.frequencies_ntk", width, base)
    _check_positive("rope.frequencies_ntk", factor=factor)
    check.domain("rope.frequencies_ntk", width != 2, "a rotary width of 0 or at least 4", width=width)
    return frequencies(width, base=base * factor ** (width / (width - 2)))


def frequencies_dynamic_ntk(
    width: int, *, base: float, factor: float, length: int, max_length: int
) -> Float[Tensor, " r"]:
    """NTK-aware scaling by a factor that grows with the length of the sequence past max_length.

    Raises: DomainError as `frequencies_ntk`, and for a length or max_length below 1.
    """
    _check_positive("rope.frequencies_dynamic_ntk", factor=factor, length=length, max_length=max_length)
    # 1 up to max_length is written out: in floating point the expression may miss it.
    grown = factor * length / max_length - (factor - 1.0) if length > max_length else 1.0
    return frequencies_ntk(width, base=base, factor=grown)


def frequencies_yarn(
    width: int, *, base: float, factor: float, original_length: int, beta_fast: float, beta_slow: float
) -> Float[Tensor, " r"]:
    """YaRN: fast pairs keep their frequency, slow pairs are interpolated, a linear ramp of indices lies between.

    Raises: DomainError as `frequencies`, for base <= 1, for a factor, length or beta that is not positive, and for
        beta_fast < beta_slow.
    """
    operation = "rope.frequencies_yarn"
    _check_positive(operation, factor=factor, original_length=original_length, beta_fast=beta_fast, beta_slow=beta_slow)
    theta = frequencies(width, base=base)
    check.domain(operation, base > 1, "base > 1", base=base)
    check.domain(operation, beta_fast >= beta_slow, "beta_fast >= beta_slow", beta_fast=beta_fast, beta_slow=beta_slow)
    lo = max(math.floor(_turning_index(beta_fast, original_length, width, base)), 0)
    hi = min(math.ceil(_turning_index(beta_slow, original_length, width, base)), width - 1)
    i = torch.arange(width // 2, dtype=torch.float64)
    interpolated = ((i - lo) / max(hi - lo, YARN_RAMP_FLOOR)).clamp(0.0, 1.0)
    return theta * (1.0 - interpolated) + (theta / factor) * interpolated


def yarn_magnitude(factor: float) -> float:
    """What YaRN multiplies cos and sin by: 0.1 ln factor + 1 for factor > 1, else 1.

    Raises: DomainError for a factor that is not positive.
    """
    _check_positive("rope.yarn_magnitude", factor=factor)
    return 1.0 + YARN_MAGNITUDE_SLOPE * math.log(factor) if factor > 1 else 1.0


def angles(positions: Shaped[Tensor, "*p"], frequencies: Float[Tensor, " r"]) -> Float[Tensor, "*p r"]:
    """The angle p θ_i of every pair at every position, in float64 and on the device of the positions.

    Positions up to 2^31 keep angles right to 1e-6; on devices without float64 everything is float32, and off by as
    much as 0.06 at position 2^20.
    Raises: DomainError unless positions are real or integer and frequencies floating; ShapeError unless `frequencies`
        has one axis.
    """
    if not isinstance(positions, Tensor) or positions.dtype not in check.FLOATS:
        check.integer("rope.angles", "positions", positions)
    check.real("rope.angles", "frequencies", frequencies)
    check.shape("rope.angles", frequencies.ndim == 1, "frequencies of shape (r,)", frequencies=frequencies)
    dtype = _angle_dtype(positions.device)
    # The dtype first: a device without float64 cannot receive it.
    return positions.to(dtype)[..., None] * frequencies.to(dtype).to(positions.device)


def rotate_interleaved(x: Float[Tensor, "*x d"], angles: Float[Tensor, "*a r"]) -> Float[Tensor, "*x d"]:
    """Rotates the adjacent pairs (x_0, x_1), (x_2, x_3), ... counter-clockwise by `angles`.

    Raises: ShapeError for an odd d, d != 2r, or angles that do not broadcast.
    """
    _check_rotation("rope.rotate_interleaved", x, angles)
    a, b = _rotated(x[..., 0::2], x[..., 1::2], angles)
    return torch.stack([a, b], dim=-1).flatten(-2)


def rotate_half_split(x: Float[Tensor, "*x d"], angles: Float[Tensor, "*a r"]) -> Float[Tensor, "*x d"]:
    """Rotates the pairs (x_i, x_(i+d/2)) counter-clockwise by `angles`.

    Raises: as `rotate_interleaved`.
    """
    _check_rotation("rope.rotate_half_split", x, angles)
    half = angles.shape[-1]
    return torch.cat(_rotated(x[..., :half], x[..., half:], angles), dim=-1)


def rotate_contiguous(
    x: Float[Tensor, "*x d"], angles: Float[Tensor, "*a r"], rotate: Callable[..., Tensor]
) -> Float[Tensor, "*x d"]:
    """Partial rotation of a contiguous block: `rotate` acts on the first 2r features, the rest passes through.

    Raises: ShapeError for 2r > d and as `rotate`.
    """
    _check_axes("rope.rotate_contiguous", x, angles)
    width = 2 * angles.shape[-1]
    check.shape("rope.rotate_contiguous", width <= x.shape[-1], "x with at least 2r features", x=x, angles=angles)
    return torch.cat([rotate(x[..., :width], angles), x[..., width:]], dim=-1)


def rotate_proportional(x: Float[Tensor, "*x d"], angles: Float[Tensor, "*a r"]) -> Float[Tensor, "*x d"]:
    """Partial rotation of the r fastest pairs of the half-split layout of the whole head.

    Raises: ShapeError for an odd d, 2r > d, or angles that do not broadcast.
    """
    _check_rotation("rope.rotate_proportional", x, angles, partial=True)
    r, half = angles.shape[-1], x.shape[-1] // 2
    a, b = _rotated(x[..., :r], x[..., half : half + r], angles)
    return torch.cat([a, x[..., r:half], b, x[..., half + r :]], dim=-1)


def half_split_order(width: int) -> Int[Tensor, " d"]:
    """The indices (0, 2, 4, ..., 1, 3, 5, ...) that take the interleaved layout to the half-split one, on the CPU.

    Raises: DomainError for an odd or negative width.
    """
    _check_width("rope.half_split_order", width)
    return torch.cat([torch.arange(0, width, 2), torch.arange(1, width + 1, 2)])


def interleaved_order(width: int) -> Int[Tensor, " d"]:
    """The indices (0, width/2, 1, width/2 + 1, ...) that take the half-split layout to the interleaved one, on the CPU.

    Raises: DomainError for an odd or negative width.
    """
    _check_width("rope.interleaved_order", width)
    first = torch.arange(width // 2)
    return torch.stack([first, first + width // 2], dim=-1).flatten()


def permute_projection(
    weight: Float[Tensor, "*i f"], *, heads: int, order: Int[Tensor, " r2"] | Sequence[int]
) -> Float[Tensor, "*i f"]:
    """A query or key projection (weight or bias) whose output features are taken in `order` within every head.

    Raises: ShapeError unless heads divides the features and order fits a head; DomainError unless an order given as
        Python numbers is a permutation (one that is a tensor is not looked at).
    """
    operation = "rope.permute_projection"
    check.real(operation, "weight", weight)
    check.domain(operation, heads >= 1, "heads >= 1", heads=heads)
    # Here and below: Dynamo puts no number into a text that it takes for open.
    if weight.ndim < 1 or weight.shape[-1] % heads != 0:
        check.shape(operation, False, f"features in {heads} equal heads", weight=weight)
    split = weight.unflatten(-1, (heads, weight.shape[-1] // heads))
    return _head_permuted(split, _order(operation, order, split.shape[-1])).flatten(-2)


def permute_gau(
    w_in: Float[Tensor, "d f"],
    b_in: Float[Tensor, "..."] | None,
    gamma: Float[Tensor, "..."],
    beta: Float[Tensor, "..."] | None,
    *,
    s: int,
    order: Int[Tensor, " r2"] | Sequence[int],
) -> PermutedGau:
    """The weights of a GAU whose shared s features, the last s columns of its input projection, are taken in `order`.

    Raises: ShapeError for fewer than s columns, gamma of another width, or a bias that does not fit its weight;
        DomainError as permute_projection.
    """
    operation = "rope.permute_gau"
    index = _order(operation, order, s)
    for name, array in (("w_in", w_in), ("b_in", b_in), ("gamma", gamma), ("beta", beta)):
        if array is not None:
            check.real(operation, name, array)
    if gamma.shape[-1:] != (s,):
        check.shape(operation, False, f"gamma with {s} features", gamma=gamma)
    columns = w_in.shape[-1] - s if w_in.ndim else -1
    if columns < 0:
        check.shape(operation, False, f"w_in with at least {s} features", w_in=w_in)
    for name, bias, weight in (("b_in", b_in, w_in.shape[-1:]), ("beta", beta, gamma.shape)):
        fits = bias is None or bias.shape == weight
        check.shape(operation, fits, f"{name} of shape {tuple(weight)}", received=bias)

    def moved(array: Tensor, start: int) -> Tensor:
        return torch.cat([array[..., :start], _head_permuted(array[..., start:], index)], dim=-1)

    return PermutedGau(
        moved(w_in, columns),
        None if b_in is None else moved(b_in, columns),
        moved(gamma, 0),
        None if beta is None else moved(beta, 0),
    )


def _turning_index(turns: float, length: int, width: int, base: float) -> float:
    """The index i of the pair that turns `turns` times in `length` positions: 2π turns = length base^(-2i/width)."""
    return width / 2 * math.log(length / (2 * math.pi * turns)) / math.log(base)


def _angle_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _rotated(a: Tensor, b: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    dtype, angles = a.dtype, angles.to(_angle_dtype(angles.device))
    a, b = check.island(a), check.island(b)
    cos, sin = _table(torch.cos(angles).to(a.dtype)), _table(torch.sin(angles).to(a.dtype))
    return (a * cos - b * sin).to(dtype), (a * sin + b * cos).to(dtype)


def _table(x: Tensor) -> Tensor:
    """x as numbers in memory: compiled code would compute cosines and sines anew for every head of every sequence."""
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x


def _check_axes(operation: str, x: Tensor, angles: Tensor) -> None:
    check.real(operation, "x", x)
    check.real(operation, "angles", angles)
    check.shape(operation, min(x.ndim, angles.ndim) >= 1, "x of shape (..., d), angles (..., r)", x=x, angles=angles)


def _check_rotation(operation: str, x: Tensor, angles: Tensor, *, partial: bool = False) -> None:
    _check_axes(operation, x, angles)
    d, r = x.shape[-1], angles.shape[-1]
    check.shape(operation, d % 2 == 0, "an even rotary width", x=x, angles=angles)
    if partial:
        check.shape(operation, 2 * r <= d, "angles for at most d/2 pairs", x=x, angles=angles)
    else:
        check.shape(operation, 2 * r == d, "angles for d/2 pairs", x=x, angles=angles)
    fits = check.broadcasts(angles.shape[:-1], x.shape[:-1])
    expected = "angles that broadcast to x[..., :r]; insert the head axis, angles[..., None, :]"
    check.shape(operation, fits, expected, x=x, angles=angles)


def _order(operation: str, order: Tensor | Sequence[int], width: int) -> Tensor:
    """`order` as int64; values are checked only where they are Python numbers."""
    index = check.integer(operation, "order", order if isinstance(order, Tensor) else torch.tensor(order or [0]))
    if not isinstance(order, Tensor):
        index = index[: len(order)]
        is_permutation = index.ndim == 1 and sorted(order) == list(range(len(order)))
        check.domain(operation, is_permutation, f"a permutation of 0 ... {len(order) - 1}", order=list(order))
    if index.ndim != 1 or index.shape[0] > width:
        check.shape(operation, False, f"an order of at most {width} indices", order=index)
    return index


def _head_permuted(x: Tensor, order: Tensor) -> Tensor:
    """x whose first len(order) features are taken in `order`; the others stay."""
    return torch.cat([x.index_select(-1, order.to(x.device)), x[..., order.shape[0] :]], dim=-1)


def _check_width(operation: str, width: int) -> None:
    even = isinstance(width, int) and width >= 0 and width % 2 == 0
    check.domain(operation, even, "an even rotary width", width=width)


def _check_width_and_base(operation: str, width: int, base: float) -> None:
    _check_width(operation, width)
    _check_positive(operation, base=base)


def _check_positive(operation: str, **numbers: float | int) -> None:
    for name, number in numbers.items():
        check.domain(operation, 0 < number < math.inf, f"{name} > 0", **{name: number})
