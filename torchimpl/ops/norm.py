"""Normalisation of the last axis by its standard deviation or by its root mean square.

layer_norm: y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias
rms_norm:   y = x / sqrt(mean(x^2) + epsilon)

Specification: refimpl/ops/norm.py. In 16 bits everything is formed in float32 and rounded once.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from torchimpl import check

# Largest magnitude of the specification; in float32 and bfloat16 a square overflows beyond 1.8e19 already.
LARGEST = 1e150


def rms_norm(x: Float[Tensor, "*b d"], *, epsilon: float) -> Float[Tensor, "*b d"]:
    """Each row divided by its root mean square; a row of zeros gives zeros with zero gradient when epsilon = 0.

    Raises: DomainError for epsilon < 0 or a tensor that is not floating; ShapeError for a scalar x.
    """
    return _over_root(_row("norm.rms_norm", x, epsilon), epsilon).to(x.dtype)


def rms_norm_scaled(x: Float[Tensor, "*b d"], scale: Float[Tensor, " _d"], *, epsilon: float) -> Float[Tensor, "*b d"]:
    """rms_norm followed by a trained scale per feature.

    Raises: as rms_norm; ShapeError unless scale has shape (d,).
    """
    wide = _row("norm.rms_norm_scaled", x, epsilon)
    _feature("norm.rms_norm_scaled", "scale", scale, x)
    return (_over_root(wide, epsilon) * scale).to(x.dtype)


def layer_norm(
    x: Float[Tensor, "*b d"], scale: Float[Tensor, " _d"], bias: Float[Tensor, " _d"], *, epsilon: float
) -> Float[Tensor, "*b d"]:
    """Each row centred, divided by its standard deviation, then scaled and shifted per feature.

    Takes torch's fused layer_norm where epsilon is a normal number of the format in which the root is formed. There a
    constant row gives bias but for the rounding of its mean over sqrt(epsilon), which torch's CPU kernel does not have.
    Raises: as rms_norm; ShapeError unless scale and bias have shape (d,).
    """
    wide = _row("norm.layer_norm", x, epsilon)
    for name, values in (("scale", scale), ("bias", bias)):
        _feature("norm.layer_norm", name, values, x)
    if epsilon >= torch.finfo(wide.dtype).tiny and x.dtype == scale.dtype == bias.dtype:
        return functional.layer_norm(x, x.shape[-1:], scale, bias, epsilon)
    return _layer_norm_plain(wide, scale, bias, epsilon).to(x.dtype)


def _layer_norm_plain(x: Tensor, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    # The rounded mean of equal numbers need not equal them. What then remains is an error, not a function of x.
    constant = (x == x[..., :1]).all(dim=-1, keepdim=True)
    return _over_root(centred - (centred * constant).detach(), epsilon) * scale + bias


def _row(operation: str, x: Tensor, epsilon: float) -> Tensor:
    check.real(operation, "x", x)
    check.shape(operation, x.ndim >= 1, "x of shape (..., d)", x=x)
    check.domain(operation, 0 <= epsilon < math.inf, "a finite epsilon >= 0", epsilon=epsilon)
    return check.island(x)


def _feature(operation: str, name: str, values: Tensor, x: Tensor) -> None:
    check.real(operation, name, values)
    check.shape(operation, values.shape == x.shape[-1:], f"{name} of shape (d,)", x=x, **{name: values})


def _over_root(x: Tensor, epsilon: float) -> Tensor:
    power = (x * x).mean(dim=-1, keepdim=True) + epsilon
    zero = power == 0
    # Two choices: the root must not see the 0 whose slope is infinite, and 0/0 counts as 0.
    return x * torch.rsqrt(power.masked_fill(zero, 1)).masked_fill(zero, 0)
