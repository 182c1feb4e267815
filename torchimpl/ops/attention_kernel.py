"""An attention kernel turns the scores of every query against every key into weights, and hides the masked keys.

    weights = kernel(scores, mask),   weights_ij = 0 wherever mask_ij is False

Specification: refimpl/ops/attention_kernel.py. In 16 bits everything is formed in float32 and rounded once. Masked
scores are replaced before anything is formed of them, so that neither value nor gradient depends on them, whatever they
are; a row without a visible key has weights and gradients of 0.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from torchimpl import check

# softmax_plus equals softmax on rows of this many visible keys: the length its authors trained with.
SOFTMAX_PLUS_LENGTH = 512
# Mean and standard deviation of the Laplace kernel (arXiv:2209.10655).
LAPLACE_MEAN = math.sqrt(1 / 2)
LAPLACE_DEVIATION = math.sqrt(1 / (4 * math.pi))


def visible_lengths(scores: Float[Tensor, "*row m"], mask: Bool[Tensor, "..."] | None) -> Int[Tensor, "*row 1"]:
    """The number of keys visible to every row, of shape (..., 1).

    Raises: ShapeError for a mask that does not broadcast to the scores; DomainError for a mask that is not boolean.
    """
    _checked("attention_kernel.visible_lengths", scores, mask)
    return _lengths(scores, mask).expand(*scores.shape[:-1], 1)


def softmax(scores: Float[Tensor, "*s"], mask: Bool[Tensor, "..."] | None) -> Float[Tensor, "*s"]:
    """Exponentials normalised over the visible keys of a row.

    Raises: as `visible_lengths`; DomainError for scores that are not floating.
    """
    wide = _checked("attention_kernel.softmax", scores, mask)
    return _softmax(wide, mask).to(scores.dtype)


def softmax_plus(scores: Float[Tensor, "*s"], mask: Bool[Tensor, "..."] | None, *, n_min: int) -> Float[Tensor, "*s"]:
    """softmax of the scores times ln max(n_i, n_min) / ln 512, n_i being the keys visible to the row.

    Raises: as `softmax`; DomainError unless n_min >= 1.
    """
    wide = _checked("attention_kernel.softmax_plus", scores, mask)
    check.domain("attention_kernel.softmax_plus", n_min >= 1, "n_min >= 1", n_min=n_min)
    lengths = _lengths(wide, mask).clamp(min=n_min).to(wide.dtype)
    return _softmax(wide * (lengths.log() / math.log(SOFTMAX_PLUS_LENGTH)), mask).to(scores.dtype)


def squared_relu_visible(scores: Float[Tensor, "*s"], mask: Bool[Tensor, "..."] | None) -> Float[Tensor, "*s"]:
    """Squared ReLU divided by the number of keys visible to the row.

    Raises: as `softmax`.
    """
    wide = _checked("attention_kernel.squared_relu_visible", scores, mask)
    return (_squared_relu(wide, mask) / _lengths(wide, mask).clamp(min=1)).to(scores.dtype)


def squared_relu_array(scores: Float[Tensor, "*s"], mask: Bool[Tensor, "..."] | None) -> Float[Tensor, "*s"]:
    """Squared ReLU divided by the length of the key axis, padding included.

    Raises: as `softmax`.
    """
    wide = _checked("attention_kernel.squared_relu_array", scores, mask)
    return (_squared_relu(wide, mask) / scores.shape[-1]).to(scores.dtype)


def squared_relu_constant(
    scores: Float[Tensor, "*s"], mask: Bool[Tensor, "..."] | None, *, length: int
) -> Float[Tensor, "*s"]:
    """Squared ReLU divided by a constant; length 1 is the bare squared ReLU.

    Raises: as `softmax`; DomainError unless length >= 1.
    """
    wide = _checked("attention_kernel.squared_relu_constant", scores, mask)
    check.domain("attention_kernel.squared_relu_constant", length >= 1, "length >= 1", length=length)
    return (_squared_relu(wide, mask) / length).to(scores.dtype)


def laplace(scores: Float[Tensor, "*s"], mask: Bool[Tensor, "..."] | None) -> Float[Tensor, "*s"]:
    """The distribution function of a normal law with mean √(1/2) and variance 1/(4π).

    Raises: as `softmax`.
    """
    wide = _checked("attention_kernel.laplace", scores, mask)
    # The law's value at minus infinity is 0, and so is its slope.
    z = (LAPLACE_MEAN - _hidden(wide, mask, -math.inf)) / (LAPLACE_DEVIATION * math.sqrt(2))
    return (torch.special.erfc(z) / 2).to(scores.dtype)


def _checked(operation: str, scores: Tensor, mask: Tensor | None) -> Tensor:
    check.real(operation, "scores", scores)
    check.shape(operation, scores.ndim >= 1, "scores with a key axis, (..., m)", scores=scores)
    if mask is not None:
        check.boolean(operation, "mask", mask)
        fits = check.broadcasts(mask.shape, scores.shape)
        check.shape(operation, fits, "a mask that broadcasts to the scores", scores=scores, mask=mask)
    return check.island(scores)


def _lengths(scores: Tensor, mask: Tensor | None) -> Tensor:
    # Broadcasts to (..., 1), but is not broadcast: most masks are the same for every row.
    if mask is None:
        return torch.full((1,), scores.shape[-1], device=scores.device)
    return mask.expand(*mask.shape[:-1], scores.shape[-1]).sum(dim=-1, keepdim=True)


def _hidden(scores: Tensor, mask: Tensor | None, value: float) -> Tensor:
    return scores if mask is None else scores.masked_fill(~mask, value)


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return functional.softmax(scores, dim=-1)
    seen = mask.any(dim=-1, keepdim=True)
    # exp(-inf) is exactly 0. A row of nothing but -inf would be NaN: it becomes a row of zeros, and its weights 0.
    visible = scores.masked_fill(~mask & seen, -math.inf).masked_fill(~seen, 0)
    return functional.softmax(visible, dim=-1).masked_fill(~seen, 0)


def _squared_relu(scores: Tensor, mask: Tensor | None) -> Tensor:
    return functional.relu(_hidden(scores, mask, 0.0)).square()
