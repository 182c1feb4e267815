"""Elementwise activations and the positive feature map of linear attention.

silu(x) = x sigmoid(x),  gelu(x) = x Phi(x),  elu_plus_one(x) = elu(x) + 1

Specification: refimpl/ops/activation.py. Every function is formed in float32 for 16-bit input and rounded once.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from torchimpl import check

# Coefficient of the cubic term in the tanh form of gelu, which torch's kernel holds as well; Hendrycks and Gimpel 2016.
GELU_CUBIC = 0.044715


def relu(x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """The positive part of x; its derivative at 0 is 0.

    Raises: DomainError unless x is a floating tensor.
    """
    check.real("activation.relu", "x", x)
    return _PositivePart.apply(x) if torch.compiler.is_compiling() and x.requires_grad else functional.relu(x)


def silu(x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """x times its own logistic function.

    Raises: DomainError unless x is a floating tensor.
    """
    return functional.silu(check.real("activation.silu", "x", x))


def gelu_erf(x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """x times the standard normal distribution function.

    Formed with erfc: torch's own gelu is 1 + erf, which is 0 below about -5.5 in float32, and on the CPU its erf is an
    approximation that is off by several units elsewhere.
    Raises: DomainError unless x is a floating tensor.
    """
    wide = check.island(check.real("activation.gelu_erf", "x", x))
    return _GeluErf.apply(wide).to(x.dtype)


def gelu_tanh(x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """The tanh approximation of gelu.

    torch's kernel forms 1 + tanh: accurate against abs(x), 0 far below 0.
    Raises: DomainError unless x is a floating tensor.
    """
    return functional.gelu(check.real("activation.gelu_tanh", "x", x), approximate="tanh")


def elu_plus_one(x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """elu(x) + 1: x + 1 above 0, exp(x) with full relative accuracy below; its derivative at 0 is 1.

    Raises: DomainError unless x is a floating tensor.
    """
    check.real("activation.elu_plus_one", "x", x)
    # One summand is always 0 or 1, so that 16 bits round once. At 0, where relu has slope 0, clamp has slope 1.
    return functional.relu(x) + torch.exp(x.clamp(max=0))


class _PositivePart(torch.autograd.Function):
    # Compiled for CPUs, torch's own relu keeps a boolean tensor for its gradient, which Inductor writes and reads one
    # element at a time. The sign of the result, which is there in any case, tells the same.
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = functional.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * torch.sign(y)


class _GeluErf(torch.autograd.Function):
    # In place, and with torch's derivative: a pass over memory for every operation is what training waits for, and one
    # that autograd forms of erfc is slower still where it is compiled.
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = x * -math.sqrt(0.5)
        return torch.special.erfc(y, out=y).mul_(x).div_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(gradient, x)
