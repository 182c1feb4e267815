"""Dense layers in float32 on a processor: by oneDNN, where torch would ask MKL.

On two cores of an AMD EPYC oneDNN forms y = x W and dx = dy Wᵀ faster than MKL, and dW = xᵀ dy more slowly; each does
what it is better at (docs/log.md has the figures). Every other case is torch.nn.functional.linear.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

ONEDNN = torch.backends.mkldnn.is_available()
# Multiplications from which on the product gains more than the call costs.
LEAST = 2**25


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x (..., in) W (in, out) + b (out,), for arguments that fit."""
    return _OneDNN.apply(x, w, b) if _suits(x, w, b) else functional.linear(x, w.T, b)


def by_onednn(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """The same by oneDNN, without derivatives; all of float32, on a processor."""
    # Columns cut from a wider array would go through oneDNN's plain loops, which are thousands of times slower.
    rows = w.T if w.is_contiguous() or w.T.is_contiguous() else w.T.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, rows, b, "none", [], "")


# As one operator, which a compiled graph calls: Inductor takes _linear_pointwise for constant weights only.
_operator = torch.library.custom_op("refimpl::dense", by_onednn, mutates_args=(), device_types="cpu")


@_operator.register_fake
def _(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[1])


class _OneDNN(torch.autograd.Function):
    # A setup_context would let functorch in, but makes every call inspect a signature.
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return (_operator if torch.compiler.is_compiling() else by_onednn)(x, w, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = linear(dy, w.T, None) if needs_x else None
        dw = _outer(x.reshape(-1, x.shape[-1]), rows, w) if needs_w else None
        return dx, dw, rows.sum(dim=0) if needs_b else None


def _outer(x: Tensor, dy: Tensor, w: Tensor) -> Tensor:
    # In the layout of w: the gradient of an embedding that is also the last layer would be copied into it.
    return (dy.T @ x).T if w.T.is_contiguous() and not w.is_contiguous() else x.T @ dy


def _suits(x: Tensor, w: Tensor, b: Tensor | None) -> bool:
    given = [tensor for tensor in (x, w, b) if tensor is not None]
    if (
        not ONEDNN
        or x.numel() * w.shape[1] < LEAST
        or any(t.device.type != "cpu" or t.dtype != torch.float32 for t in given)
    ):
        return False
    # Autocast changes the format, and an exported graph must not name this operator.
    elsewhere = torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting()
    return not elsewhere and (torch.compiler.is_compiling() or not _transformed())


def _transformed() -> bool:
    """Inside torch.func's transforms, or where a forward derivative is taken: _OneDNN has neither."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
