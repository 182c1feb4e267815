"""One vector per sentence from one vector per token.

masked_mean: y = sum_n mask_n x_n / max(sum_n mask_n, 1)

Specification: refimpl/ops/pooling.py. Sums of 16-bit tokens are formed in float32 and means rounded once.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from torchimpl import check


def first(x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b d"]:
    """The vector at position 0 of the array, where [CLS] stands; a view of x.

    Raises: ShapeError for rank < 2 or without any token; DomainError unless x is floating.
    """
    check.real("pooling.first", "x", x)
    check.shape("pooling.first", x.ndim >= 2 and x.shape[-2] >= 1, "x of shape (..., n, d) with n >= 1", x=x)
    return x[..., 0, :]


def masked_mean(x: Float[Tensor, "*b n d"], mask: Bool[Tensor, "..."]) -> Float[Tensor, "*b d"]:
    """The mean of the unmasked tokens; what masked tokens hold, NaN included, reaches neither it nor its gradient.

    Raises: ShapeError unless x is (..., n, d) and mask (..., n); DomainError for a mask that is not boolean.
    """
    return _masked_mean("pooling.masked_mean", "x", x, mask).to(x.dtype)


def first_last_average(
    first: Float[Tensor, "*b n d"], last: Float[Tensor, "..."], mask: Bool[Tensor, "..."]
) -> Float[Tensor, "*b d"]:
    """The average of the masked means of two blocks' outputs.

    Raises: ShapeError unless first and last have one shape (..., n, d) and mask is (..., n); DomainError for a mask
        that is not boolean.
    """
    operation = "pooling.first_last_average"
    check.real(operation, "first", first)
    check.real(operation, "last", last)
    check.shape(operation, first.shape == last.shape, "equal shapes", first=first, last=last)
    both = _masked_mean(operation, "first", first, mask) + _masked_mean(operation, "last", last, mask)
    return (0.5 * both).to(first.dtype)


def pooler_linear(
    x: Float[Tensor, "*b n d"], kernel: Float[Tensor, "_d e"], bias: Float[Tensor, " _e"]
) -> Float[Tensor, "*b e"]:
    """A dense layer on the vector at position 0; kernel is (in, out), the transpose of torch's Linear.weight.

    Raises: ShapeError without any token or unless kernel is (d, e) and bias (e,); DomainError unless all are floating.
    """
    return _pooler("pooling.pooler_linear", x, kernel, bias)


def pooler_tanh(
    x: Float[Tensor, "*b n d"], kernel: Float[Tensor, "_d e"], bias: Float[Tensor, " _e"]
) -> Float[Tensor, "*b e"]:
    """BERT's pooler: pooler_linear followed by tanh.

    Raises: as pooler_linear.
    """
    return torch.tanh(_pooler("pooling.pooler_tanh", x, kernel, bias))


def _masked_mean(operation: str, name: str, x: Tensor, mask: Tensor) -> Tensor:
    """The mean, still in float32 where x has 16 bits."""
    check.real(operation, name, x)
    check.boolean(operation, "mask", mask)
    fits = x.ndim >= 2 and mask.shape == x.shape[:-1]
    check.shape(operation, fits, f"{name} of shape (..., n, d) and mask of shape (..., n)", **{name: x, "mask": mask})
    total = check.island(x.masked_fill(~mask[..., None], 0)).sum(dim=-2)
    return total / mask.sum(dim=-1, keepdim=True).clamp(min=1)


def _pooler(operation: str, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    for name, tensor in (("x", x), ("kernel", kernel), ("bias", bias)):
        check.real(operation, name, tensor)
    fits = x.ndim >= 2 and x.shape[-2] >= 1 and kernel.ndim == 2
    fits = fits and kernel.shape[:1] == x.shape[-1:] and bias.shape == kernel.shape[1:]
    expected = "x of shape (..., n, d) with n >= 1, kernel (d, e) and bias (e,)"
    check.shape(operation, fits, expected, x=x, kernel=kernel, bias=bias)
    return functional.linear(x[..., 0, :], kernel.T, bias)
