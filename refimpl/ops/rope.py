"""Rotary position embedding (RoPE): features are rotated in pairs by an angle proportional to the position.

    a' = a cos φ - b sin φ,   b' = a sin φ + b cos φ,   φ = p θ_i,   θ_i = base^(-2i/D)

Source: Su et al., RoFormer, arXiv:2104.09864, sections 3.2 and 3.4; https://kexue.fm/archives/8265

With R_p the rotation at position p: R_p R_q = R_(p+q), R_0 = 1, and <R_p q, R_m k> depends on m - p only.
- Scores: rotate queries and keys, after every scale or offset per feature, which a rotation does not commute with.
- Rotated values: o_p = sum_m a_pm R_m v_m moves with a common shift of positions; R_(-p) o_p does not. R_(-p) is a
  rotation by `-angles`, and the output must be in the order of the input.
- Cross attention: queries and keys count positions of different sequences; by default neither side is rotated.
- Linear attention: rotate the feature maps in the numerator only; a rotated denominator may lose its sign.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from refimpl import check

# YaRN: attention logits are sharpened by (0.1 ln factor + 1)^2, fitted on LLaMA models (arXiv:2309.00071).
YARN_MAGNITUDE_SLOPE = 0.1
# YaRN's public code widens an empty ramp to this many indices, which makes it a step.
YARN_RAMP_FLOOR = 0.001


class PermutedGau(NamedTuple):
    """The weights of a GAU whose shared features were permuted; the biases are None where none were given."""

    w_in: Float[np.ndarray, "d f"]
    b_in: Float[np.ndarray, " f"] | None
    gamma: Float[np.ndarray, "*k s"]
    beta: Float[np.ndarray, "*k s"] | None


def frequencies(width: int, *, base: float) -> Float[np.ndarray, " r"]:
    """The rotation speeds of the r = width/2 pairs, in radians per position.

    θ_i = base^(-2i/width),  i = 0 ... width/2 - 1

    C1. θ_0 must be 1 and every ratio θ_(i+1)/θ_i must be base^(-2/width).
    C2. Width 0 must give no frequencies.
    Raises: DomainError for an odd or negative width or a base that is not positive.
    Precision: each θ_i has a relative error below 2^-52 (1 + ln base).
    Source: RoFormer, section 3.2.2.
    Differs: base is 10000 in RoFormer, 500000 in Llama 3, 1e6 in several others. In a contiguous partial rotation
        width is the rotated width; in a proportional one it is the whole head width: frequencies(d)[:r].
    """
    _check_width_and_base("rope.frequencies", width, base)
    return base ** (-2.0 * np.arange(width // 2) / width)


def frequencies_linear(width: int, *, base: float, factor: float) -> Float[np.ndarray, " r"]:
    """Position interpolation: every frequency is divided by `factor`.

    θ'_i = θ_i / factor

    C1. The angle at position p must equal the unscaled angle at p / factor.
    Raises: DomainError as `frequencies`, and for a factor that is not positive.
    Source: Chen et al., arXiv:2306.15595, equation 4.
    """
    _check_positive("rope.frequencies_linear", factor=factor)
    return frequencies(width, base=base) / factor


def frequencies_ntk(width: int, *, base: float, factor: float) -> Float[np.ndarray, " r"]:
    """NTK-aware scaling: a larger base keeps the fastest pair and divides the slowest by `factor`.

    θ'_i = (base factor^(width/(width-2)))^(-2i/width)

    C1. θ'_0 must be 1 and the last frequency must be the unscaled one divided by `factor`.
    Raises: DomainError as `frequencies`, for a factor that is not positive, and for width 2, whose only pair would
        have to be both the fastest and the slowest.
    Source: Peng et al., YaRN, arXiv:2309.00071, section 3.1; https://kexue.fm/archives/9675
    """
    _check_width_and_base("rope.frequencies_ntk", width, base)
    _check_positive("rope.frequencies_ntk", factor=factor)
    check.domain("rope.frequencies_ntk", width != 2, "a rotary width of 0 or at least 4", width=width)
    return frequencies(width, base=base * factor ** (width / (width - 2)))


def frequencies_dynamic_ntk(
    width: int, *, base: float, factor: float, length: int, max_length: int
) -> Float[np.ndarray, " r"]:
    """NTK-aware scaling by a factor that grows with the length of the sequence.

    θ' = frequencies_ntk(factor' = factor length/max_length - (factor - 1)) for length > max_length, else θ

    C1. Up to max_length the frequencies must be the unscaled ones, past it those of frequencies_ntk at factor'.
    Raises: DomainError as `frequencies_ntk`, and for a length or max_length below 1.
    Source: the `dynamic` type of Hugging Face transformers.
    Differs: some runtimes put max_length, a constant, in the place of the current length; keys cached at a smaller
        length carry stale frequencies and are to be rotated again.
    """
    _check_positive("rope.frequencies_dynamic_ntk", factor=factor, length=length, max_length=max_length)
    # Not folded into one expression: factor n/n_max - (factor - 1) is not exactly 1 at n = n_max.
    grown = factor * length / max_length - (factor - 1.0) if length > max_length else 1.0
    return frequencies_ntk(width, base=base, factor=grown)


def frequencies_yarn(
    width: int, *, base: float, factor: float, original_length: int, beta_fast: float, beta_slow: float
) -> Float[np.ndarray, " r"]:
    """YaRN: fast pairs keep their frequency, slow pairs are interpolated, a linear ramp of indices lies between.

    θ'_i = m_i θ_i + (1 - m_i) θ_i / factor,   m_i = 1 - clip((i - lo)/(hi - lo), 0, 1)
    lo = max(floor(t(beta_fast)), 0),   hi = min(ceil(t(beta_slow)), width - 1)
    t(β) = width ln(original_length / (2π β)) / (2 ln base): the index that turns β times in the original length

    C1. Pairs up to index lo must keep θ_i; pairs from index hi on must have θ_i / factor.
    C2. Where hi <= lo the ramp must be a step after index lo.
    Raises: DomainError as `frequencies`, for base <= 1, for a factor, length or beta that is not positive, and for
        beta_fast < beta_slow.
    Source: Peng et al., arXiv:2309.00071, section 3.2, and its public code (the clamps of lo and hi are only there).
    Differs: gpt-oss does not round lo and hi to integers.
    """
    operation = "rope.frequencies_yarn"
    _check_positive(operation, factor=factor, original_length=original_length, beta_fast=beta_fast, beta_slow=beta_slow)
    theta = frequencies(width, base=base)
    check.domain(operation, base > 1, "base > 1", base=base)
    check.domain(operation, beta_fast >= beta_slow, "beta_fast >= beta_slow", beta_fast=beta_fast, beta_slow=beta_slow)
    lo, hi = (
        width * math.log(original_length / (2 * math.pi * beta)) / (2 * math.log(base))
        for beta in (beta_fast, beta_slow)
    )
    lo, hi = max(math.floor(lo), 0), min(math.ceil(hi), width - 1)
    m = 1.0 - np.clip((np.arange(width // 2) - lo) / max(hi - lo, YARN_RAMP_FLOOR), 0.0, 1.0)
    return m * theta + (1.0 - m) * theta / factor


def yarn_magnitude(factor: float) -> float:
    """What YaRN multiplies cos and sin by, hence the rotated features of both queries and keys.

    0.1 ln factor + 1 for factor > 1, else 1

    C1. Must be exactly 1 for a factor up to 1. Features that a partial rotation passes through are not multiplied.
    Raises: DomainError for a factor that is not positive.
    Source: Peng et al., arXiv:2309.00071, section 3.4.
    """
    _check_positive("rope.yarn_magnitude", factor=factor)
    return YARN_MAGNITUDE_SLOPE * math.log(factor) + 1.0 if factor > 1 else 1.0


def angles(positions: Shaped[np.ndarray, "*p"], frequencies: Shaped[np.ndarray, " r"]) -> Float[np.ndarray, "*p r"]:
    """The angle of every pair at every position; any real positions, in any order, negative ones included.

    φ_pi = p θ_i

    C1. Position 0 must give angle 0; padding and packing are expressed in `positions` alone.
    Raises: DomainError for NaN or infinity; ShapeError unless `frequencies` has one axis.
    Precision: form the product, cos and sin in float64, or range-reduced: at position 2^20 float64 is off by 4.4e-11,
        float32 by 6e-2, and a table of bfloat16 frequencies by more than 0.5 before position 512.
    """
    positions = check.real("rope.angles", "positions", positions)
    theta = check.real("rope.angles", "frequencies", frequencies)
    check.shape("rope.angles", theta.ndim == 1, "frequencies of shape (r,)", frequencies=theta)
    return positions[..., None] * theta


def rotate_interleaved(x: Shaped[np.ndarray, "*x d"], angles: Shaped[np.ndarray, "*a r"]) -> Float[np.ndarray, "*x d"]:
    """Rotates the adjacent pairs (x_0, x_1), (x_2, x_3), ... counter-clockwise by `angles`.

    y_2i = x_2i cos φ_i - x_(2i+1) sin φ_i,   y_(2i+1) = x_2i sin φ_i + x_(2i+1) cos φ_i

    C1. `angles` must hold d/2 angles per token and broadcast to x without enlarging it: heads are the caller's axis.
    C2. Angle 0 must give x back exactly; width 0 must give x back.
    C3. The rotated pair must stand where its input stood: no concatenation of the two halves of pairs.
    Raises: ShapeError for an odd d, d != 2r, or angles that do not broadcast; DomainError for NaN or infinity.
    Precision: the budget is measured against |x_2i cos φ| + |x_(2i+1) sin φ|.
    Source: RoFormer, section 3.4.2. Used by bert4keras, GPT-J, Hugging Face RoFormer.
    Differs: `rotate_half_split`, the default of ONNX RotaryEmbedding; the same attention scores on permuted weights.
    """
    x, angles = _checked("rope.rotate_interleaved", x, angles)
    a, b = _rotated(x[..., 0::2], x[..., 1::2], angles)
    return np.stack([a, b], axis=-1).reshape(x.shape)


def rotate_half_split(x: Shaped[np.ndarray, "*x d"], angles: Shaped[np.ndarray, "*a r"]) -> Float[np.ndarray, "*x d"]:
    """Rotates the pairs (x_i, x_(i+d/2)) counter-clockwise by `angles`.

    y_i = x_i cos φ_i - x_(i+d/2) sin φ_i,   y_(i+d/2) = x_i sin φ_i + x_(i+d/2) cos φ_i

    C1. rotate_half_split(x[..., o], φ) must equal rotate_interleaved(x, φ)[..., o] for o = half_split_order(d).
    C2. Shapes, angle 0 and width 0 as in `rotate_interleaved`.
    Raises, Precision: as `rotate_interleaved`.
    Source: GPT-NeoX and LLaMA in Hugging Face transformers; the pseudo-code of FLASH, arXiv:2202.10447.
    """
    x, angles = _checked("rope.rotate_half_split", x, angles)
    r = angles.shape[-1]
    return np.concatenate(_rotated(x[..., :r], x[..., r:], angles), axis=-1)


def rotate_contiguous(
    x: Shaped[np.ndarray, "*x d"], angles: Shaped[np.ndarray, "*a r"], rotate: Callable[..., np.ndarray]
) -> Float[np.ndarray, "*x d"]:
    """Partial rotation of a contiguous block: `rotate` acts on the first 2r features, the rest passes through.

    y = [rotate(x_(0 ... 2r-1), φ), x_(2r ... d-1)]

    C1. Features from 2r on must come back exactly.
    C2. The frequencies must be those of width 2r, not of width d.
    Raises: ShapeError for 2r > d and as `rotate`.
    Source: GPT-J (rotary_dim), GPT-NeoX (rotary_pct), ONNX RotaryEmbedding (rotary_embedding_dim).
    Differs: `rotate_proportional` pairs across the whole head.
    """
    x, angles = _real("rope.rotate_contiguous", x, angles)
    r = angles.shape[-1]
    check.shape("rope.rotate_contiguous", 2 * r <= x.shape[-1], "x with at least 2r features", x=x, angles=angles)
    return np.concatenate([rotate(x[..., : 2 * r], angles), x[..., 2 * r :]], axis=-1)


def rotate_proportional(x: Shaped[np.ndarray, "*x d"], angles: Shaped[np.ndarray, "*a r"]) -> Float[np.ndarray, "*x d"]:
    """Partial rotation of the r fastest pairs of the half-split layout of the whole head.

    (x_i, x_(i+d/2)) is rotated by φ_i for i < r and passes through for r <= i < d/2

    C1. Must equal rotate_half_split with angle 0 for the pairs from r on, which come back exactly.
    C2. The frequencies must be the first r of width d, not those of width 2r.
    Raises: ShapeError for an odd d, 2r > d, or angles that do not broadcast; DomainError for NaN or infinity.
    Source: the `proportional` type of Hugging Face transformers (Gemma 4).
    Differs: `rotate_contiguous`, the only partial layout of ONNX RotaryEmbedding.
    """
    x, angles = _checked("rope.rotate_proportional", x, angles, partial=True)
    r, half = angles.shape[-1], x.shape[-1] // 2
    a, b = _rotated(x[..., :r], x[..., half : half + r], angles)
    return np.concatenate([a, x[..., r:half], b, x[..., half + r :]], axis=-1)


def half_split_order(width: int) -> Int[np.ndarray, " d"]:
    """The index array o that takes the interleaved layout to the half-split one: o = (0, 2, 4, ..., 1, 3, 5, ...).

    C1. The even features must come first, then the odd ones, each in rising order. Queries and keys, or their weights,
        are taken by the same order: attention scores then stay the same.
    Raises: DomainError for an odd or negative width.
    """
    _check_width("rope.half_split_order", width)
    return np.arange(width).reshape(width // 2, 2).T.ravel()


def interleaved_order(width: int) -> Int[np.ndarray, " d"]:
    """The index array that takes the half-split layout to the interleaved one: (0, width/2, 1, width/2 + 1, ...).

    C1. The features of both halves must stand in turn: the inverse permutation of half_split_order(width).
    Raises: DomainError for an odd or negative width.
    """
    _check_width("rope.interleaved_order", width)
    return np.arange(width).reshape(2, width // 2).T.ravel()


def permute_projection(
    weight: Shaped[np.ndarray, "*i f"], *, heads: int, order: Shaped[np.ndarray, " r2"] | Sequence[int]
) -> Float[np.ndarray, "*i f"]:
    """A query or key projection (weight or bias) whose output features are taken in `order` within every head.

    weight'[..., h d + j] = weight[..., h d + order_j] for j < len(order), unchanged for the other features of head h

    C1. `heads` must be the number of heads of this very projection: the key heads in grouped-query attention.
    C2. With a contiguous partial rotation only the rotated features move: order has the rotary width.
    Value projections keep their order unless values are rotated too.
    Raises: ShapeError unless heads divides the features and order fits a head; DomainError unless order is a
        permutation of 0 ... len(order) - 1.
    """
    operation = "rope.permute_projection"
    weight = check.real(operation, "weight", weight)
    check.domain(operation, heads >= 1, "heads >= 1", heads=heads)
    features = weight.shape[-1] if weight.ndim else -1
    check.shape(operation, features % heads == 0 <= features, f"features in {heads} equal heads", weight=weight)
    index = _head_index(operation, order, features // heads)
    split = weight.reshape(weight.shape[:-1] + (heads, features // heads))
    return split[..., index].reshape(weight.shape)


def permute_gau(
    w_in: Shaped[np.ndarray, "d f"],
    b_in: Shaped[np.ndarray, "..."] | None,
    gamma: Shaped[np.ndarray, "..."],
    beta: Shaped[np.ndarray, "..."] | None,
    *,
    s: int,
    order: Shaped[np.ndarray, " r2"] | Sequence[int],
) -> PermutedGau:
    """The weights of a GAU whose shared s features, the last s columns of its input projection, are taken in `order`.

    C1. The columns, their bias, and every gamma and beta must move together; the 2e columns before must not move.
    Raises: ShapeError for fewer than s columns, gamma of another width, or a bias that does not fit its weight;
        DomainError as permute_projection.
    """
    operation = "rope.permute_gau"
    index = _head_index(operation, order, s)
    check.shape(operation, np.shape(gamma)[-1:] == (s,), f"gamma with {s} features", gamma=gamma)
    for name, bias, weight in (("b_in", b_in, np.shape(w_in)[-1:]), ("beta", beta, np.shape(gamma))):
        check.shape(operation, bias is None or np.shape(bias) == weight, f"{name} of shape {weight}", received=bias)
    return PermutedGau(
        _last_permuted(operation, "w_in", w_in, index),
        None if b_in is None else _last_permuted(operation, "b_in", b_in, index),
        _last_permuted(operation, "gamma", gamma, index),
        None if beta is None else _last_permuted(operation, "beta", beta, index),
    )


def _rotated(a: np.ndarray, b: np.ndarray, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = np.cos(angles), np.sin(angles)
    return a * cos - b * sin, a * sin + b * cos


def _real(operation: str, x: np.ndarray, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, angles = check.real(operation, "x", x), check.real(operation, "angles", angles)
    check.shape(operation, min(x.ndim, angles.ndim) >= 1, "x of shape (..., d), angles (..., r)", x=x, angles=angles)
    return x, angles


def _checked(
    operation: str, x: np.ndarray, angles: np.ndarray, *, partial: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    x, angles = _real(operation, x, angles)
    d, r = x.shape[-1], angles.shape[-1]
    check.shape(operation, d % 2 == 0, "an even rotary width", x=x, angles=angles)
    if partial:
        check.shape(operation, 2 * r <= d, "angles for at most d/2 pairs", x=x, angles=angles)
    else:
        check.shape(operation, 2 * r == d, "angles for d/2 pairs", x=x, angles=angles)
    pairs = x[..., :r]
    expected = "angles that broadcast to x[..., :r]; insert the head axis, angles[..., None, :]"
    common = check.broadcast(operation, expected, x=pairs, angles=angles)
    check.shape(operation, common == pairs.shape, expected, x=x, angles=angles)
    return x, angles


def _head_index(operation: str, order: np.ndarray | Sequence[int], width: int) -> np.ndarray:
    order = check.integer(operation, "order", order)
    check.shape(operation, order.ndim == 1 and len(order) <= width, f"an order of at most {width} indices", order=order)
    is_permutation = np.array_equal(np.sort(order), np.arange(len(order)))
    check.domain(operation, is_permutation, f"a permutation of 0 ... {len(order) - 1}", order=order.tolist())
    return np.concatenate([order, np.arange(len(order), width)])


def _last_permuted(operation: str, name: str, values: np.ndarray, index: np.ndarray) -> np.ndarray:
    values = check.real(operation, name, values)
    split = values.shape[-1] - len(index) if values.ndim else -1
    check.shape(operation, split >= 0, f"{name} with at least {len(index)} features", received=values)
    return np.concatenate([values[..., :split], values[..., split:][..., index]], axis=-1)


def _check_width(operation: str, width: int) -> None:
    even = isinstance(width, (int, np.integer)) and width >= 0 and width % 2 == 0
    check.domain(operation, even, "an even rotary width", width=width)


def _check_width_and_base(operation: str, width: int, base: float) -> None:
    _check_width(operation, width)
    _check_positive(operation, base=base)


def _check_positive(operation: str, **numbers: float | int) -> None:
    for name, number in numbers.items():
        check.domain(operation, math.isfinite(number) and number > 0, f"{name} > 0", **{name: number})
