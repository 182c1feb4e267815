"""An attention kernel turns the scores of every query against every key into weights, and hides the masked keys.

    weights = kernel(scores, mask),   weights_ij = 0 wherever mask_ij is False

Source: arXiv:1706.03762 (softmax), https://kexue.fm/archives/8823 (softmax_plus), arXiv:2202.10447 and
https://kexue.fm/archives/8934 (squared ReLU), arXiv:2209.10655 (Laplace)

All kernels share one signature: scores (..., m), rows over the last axis; mask boolean, True = may attend, broadcast to
the scores, None = every key is visible. Further parameters are keyword-only: bind them with functools.partial.

The squared ReLU must be divided by a length, and public code disagrees which: the keys visible to the row, the length
of the array (padding counts), or a constant. They are three functions. n_i, the number of keys visible to row i, is
counted after the mask was broadcast, so a mask of shape (b, 1, m) counts as one of shape (b, n, m).
"""

import math

import numpy as np
from jaxtyping import Float, Shaped

from refimpl import check

# softmax_plus equals softmax on rows of this many visible keys: the length its authors trained with.
SOFTMAX_PLUS_LENGTH = 512
# Mean and standard deviation of the Laplace kernel (arXiv:2209.10655): at x = sqrt(1/2) its value 1/2 and its slope
# sqrt(2) are those of relu(x)^2.
LAPLACE_MEAN = math.sqrt(1 / 2)
LAPLACE_DEVIATION = math.sqrt(1 / (4 * math.pi))


def visible_lengths(scores: Shaped[np.ndarray, "*row m"], mask: Shaped[np.ndarray, "..."] | None) -> np.ndarray:
    """The number of keys visible to every row, as integers of shape (..., 1).

    n_i = Σ_j mask_ij

    C1. The mask must be broadcast to the scores before it is counted; no mask must count m.
    Raises: ShapeError for a mask that does not broadcast to the scores; DomainError for a mask that is not boolean.
    """
    scores, mask = _checked("attention_kernel.visible_lengths", scores, mask)
    return _lengths(mask)


def softmax(scores: Shaped[np.ndarray, "*s"], mask: Shaped[np.ndarray, "..."] | None) -> Float[np.ndarray, "*s"]:
    """Exponentials normalised over the visible keys of a row.

    weights_ij = mask_ij exp(scores_ij) / Σ_l mask_il exp(scores_il)

    C1. Every row with a visible key must sum to 1; a row without one must be all zeros, never NaN.
    C2. Adding a constant to a row must change nothing: the largest visible score is subtracted first, so that
        scores of any size neither overflow nor vanish. Masked scores must not take part in that maximum.
    C3. A masked weight must be exactly 0 and must not depend on the masked score.
    Raises: ShapeError for a mask that does not broadcast to the scores; DomainError for NaN, infinity, other masks.
    Precision: relative to each weight; a score error e becomes a factor exp(2e).
    Source: arXiv:1706.03762, equation 1.
    Differs: on a fully masked row torch gives NaN, additive constants such as -1e4 a uniform row, ONNX Attention 0.
    """
    scores, mask = _checked("attention_kernel.softmax", scores, mask)
    return _softmax(scores, mask)


def softmax_plus(
    scores: Shaped[np.ndarray, "*s"], mask: Shaped[np.ndarray, "..."] | None, *, n_min: int
) -> Float[np.ndarray, "*s"]:
    """Entropy-invariant softmax: scores grow with the logarithm of the row's own number of visible keys.

    weights = softmax(λ_i scores, mask),   λ_i = ln max(n_i, n_min) / ln 512

    C1. n_i must be the number of keys visible to row i, not the length of the array; without a mask it is m.
    C2. The mask must be applied after the scaling: at n_i = n_min = 1, λ = 0 must not bring a masked key back.
    C3. n_i = 512 must give softmax; n_i < n_min must be treated as n_min.
    C4. A row without a visible key must be all zeros.
    Raises: as `softmax`; DomainError unless n_min >= 1.
    Precision: as `softmax`, with two more roundings in λ; n_i itself is exact.
    Source: https://kexue.fm/archives/8823 and 9034.
    Differs: n_min is 16 in bert4keras since 0.11.5, 2 for a few days before, 1 at the release of GAU-α and in its
        PyTorch port; the port counts the queries when there is no mask. From 16 visible keys on all agree.
    """
    scores, mask = _checked("attention_kernel.softmax_plus", scores, mask)
    check.domain("attention_kernel.softmax_plus", n_min >= 1, "n_min >= 1", n_min=n_min)
    factor = np.log(np.maximum(_lengths(mask), n_min)) / math.log(SOFTMAX_PLUS_LENGTH)
    return _softmax(scores * factor, mask)


def squared_relu_visible(
    scores: Shaped[np.ndarray, "*s"], mask: Shaped[np.ndarray, "..."] | None
) -> Float[np.ndarray, "*s"]:
    """Squared ReLU divided by the number of keys visible to the row.

    weights_ij = mask_ij max(scores_ij, 0)² / max(n_i, 1)

    C1. Appending masked keys must change nothing: padding does not count.
    C2. A row without a visible key must be all zeros; without a mask n_i is m.
    C3. Negative scores must give exactly 0; rows are not normalised to 1.
    Raises: as `softmax`.
    Precision: an interval, [max(s - e, 0)², max(s + e, 0)²] for a score error e; small scores underflow in float16,
        visible scores beyond 1e154 overflow in float64.
    Source: https://kexue.fm/archives/8934; bert4keras (normalization = squared_relu).
    Differs: `squared_relu_array`, `squared_relu_constant`.
    """
    scores, mask = _checked("attention_kernel.squared_relu_visible", scores, mask)
    return _squared_relu(scores, mask) / np.maximum(_lengths(mask), 1)


def squared_relu_array(
    scores: Shaped[np.ndarray, "*s"], mask: Shaped[np.ndarray, "..."] | None
) -> Float[np.ndarray, "*s"]:
    """Squared ReLU divided by the length of the key axis, padding included.

    weights_ij = mask_ij max(scores_ij, 0)² / m

    C1. Appending m' masked keys must scale the weights by m/(m + m'): this is not invariant to padding.
    C2. Masked weights must be exactly 0 and negative scores must give 0.
    Raises, Precision: as `squared_relu_visible`.
    Source: the pseudo-code of arXiv:2202.10447 knows no padding; lucidrains/FLASH-pytorch divides by this length.
    """
    scores, mask = _checked("attention_kernel.squared_relu_array", scores, mask)
    return _squared_relu(scores, mask) / scores.shape[-1]


def squared_relu_constant(
    scores: Shaped[np.ndarray, "*s"], mask: Shaped[np.ndarray, "..."] | None, *, length: int
) -> Float[np.ndarray, "*s"]:
    """Squared ReLU divided by one constant, the same for training and use. Length 1 is the bare squared ReLU.

    weights_ij = mask_ij max(scores_ij, 0)² / length

    C1. Neither the mask nor the length of the array must change a visible weight.
    C2. Masked weights must be exactly 0 and negative scores must give 0.
    Raises: as `softmax`; DomainError unless length >= 1.
    Precision: as `squared_relu_visible`.
    Source: https://kexue.fm/archives/9019: a constant transfers to other lengths better than the actual length.
    Differs: JunnYu/FLASHQuad_pytorch takes max_position, 512; bert4keras the visible keys.
    """
    scores, mask = _checked("attention_kernel.squared_relu_constant", scores, mask)
    check.domain("attention_kernel.squared_relu_constant", length >= 1, "length >= 1", length=length)
    return _squared_relu(scores, mask) / length


def laplace(scores: Shaped[np.ndarray, "*s"], mask: Shaped[np.ndarray, "..."] | None) -> Float[np.ndarray, "*s"]:
    """The distribution function of a normal law, a bounded stand-in for the squared ReLU.

    weights_ij = mask_ij ½ (1 + erf((scores_ij - μ) / (σ √2))),   μ = √(1/2),  σ = √(1/(4π))

    C1. The mask must be applied after the activation: laplace(0) = 0.0061 is not 0, so zeroing scores hides nothing.
    C2. A score of μ must weigh ½; weights rise with the score and stay within [0, 1].
    C3. Rows must not be normalised, and nothing is divided by a length: that is done to the scores, by the caller.
    Raises: as `softmax`.
    Precision: formed as erfc(-z)/2, z = (score - μ)/(σ√2), relative in the lower tail; the budget permits 1 + erf(z),
        absolute there. A score error e becomes e / (σ √(2π)) exp(-z²).
    Source: arXiv:2209.10655; lucidrains/FLASH-pytorch (laplace_attn_fn).
    """
    # SciPy costs import time that the other kernels need not pay.
    from scipy.special import erfc

    scores, mask = _checked("attention_kernel.laplace", scores, mask)
    return 0.5 * erfc((LAPLACE_MEAN - scores) / (LAPLACE_DEVIATION * math.sqrt(2))) * mask


def _checked(operation: str, scores: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    scores = check.real(operation, "scores", scores)
    check.shape(operation, scores.ndim >= 1, "scores with a key axis, (..., m)", scores=scores)
    if mask is None:
        return scores, np.ones(scores.shape, dtype=np.bool_)
    mask = check.boolean(operation, "mask", mask)
    expected = "a mask that broadcasts to the scores"
    common = check.broadcast(operation, expected, scores=scores, mask=mask)
    check.shape(operation, common == scores.shape, expected, scores=scores, mask=mask)
    return scores, np.broadcast_to(mask, scores.shape)


def _lengths(mask: np.ndarray) -> np.ndarray:
    return mask.sum(axis=-1, keepdims=True)


def _softmax(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    top = scores.max(axis=-1, keepdims=True, where=mask, initial=-np.inf)
    # A difference beyond float64 has the exponential 0. A masked score may exceed `top`: the minimum keeps its
    # exponential finite until the mask removes it.
    with np.errstate(over="ignore"):
        weights = np.exp(np.minimum(scores - top, 0)) * mask
    total = weights.sum(axis=-1, keepdims=True)
    # Only a fully masked row has total 0; 0/1 is its defined result.
    return weights / (total + (total == 0))


def _squared_relu(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    # Before the square, so that no masked score can overflow.
    return np.square(np.maximum(scores, 0) * mask)
