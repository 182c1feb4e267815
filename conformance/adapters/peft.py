"""PEFT: one torch.nn.Linear with a LoRA adapter, weights copied in, in PEFT's own orientation.

PEFT's lora_A (r, in) and lora_B (out, r) are the transposes of A and B. PEFT takes alpha and divides by r itself, so
alpha = scale r; scale is the ratio that the operator is given.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np

from conformance.adapters import Implementation
from conformance.adapters.tensors import to_array, to_tensor
from conformance.budget import Profile


def _layer(W: np.ndarray, A: np.ndarray, B: np.ndarray, alpha: float, *, rslora: bool = False) -> Any:
    """A LoRA layer around a Linear of weight W^T, with both factors set."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    (d, e), r = W.shape, A.shape[1]
    dtype = to_tensor(W).dtype
    base = torch.nn.Linear(d, e, bias=False, dtype=dtype)
    config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, lora_dropout=0.0)
    layer = Linear(base, "default", config=config, r=r, lora_alpha=alpha)
    layer.lora_A["default"].to(dtype)
    layer.lora_B["default"].to(dtype)
    with torch.no_grad():
        base.weight.copy_(to_tensor(W).T)
        layer.lora_A["default"].weight.copy_(to_tensor(A).T)
        layer.lora_B["default"].weight.copy_(to_tensor(B).T)
    return layer


def _blank(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    return np.zeros((A.shape[0], B.shape[1]), A.dtype)


def scale_lora(alpha: float, r: int) -> float:
    return float(_layer(np.zeros((r, r)), np.zeros((r, r)), np.zeros((r, r)), alpha).scaling["default"])


def scale_rslora(alpha: float, r: int) -> float:
    square = np.zeros((r, r))
    return float(_layer(square, square, square, alpha, rslora=True).scaling["default"])


def delta(A: np.ndarray, B: np.ndarray, scale: float) -> np.ndarray:
    return to_array(_layer(_blank(A, B), A, B, scale * A.shape[1]).get_delta_weight("default").T)


def apply(x: np.ndarray, W: np.ndarray, A: np.ndarray, B: np.ndarray, scale: float) -> np.ndarray:
    return to_array(_layer(W, A, B, scale * A.shape[1])(to_tensor(x)))


def merge(W: np.ndarray, A: np.ndarray, B: np.ndarray, scale: float) -> np.ndarray:
    layer = _layer(W, A, B, scale * A.shape[1])
    layer.merge()
    return to_array(layer.get_base_layer().weight.T)


def unmerge(W: np.ndarray, A: np.ndarray, B: np.ndarray, scale: float) -> np.ndarray:
    layer = _layer(W, A, B, scale * A.shape[1])
    # Unmerging needs a merged layer: the weight that is given is the merged one.
    layer.merged_adapters = ["default"]
    layer.unmerge()
    return to_array(layer.get_base_layer().weight.T)


def gradients_factored(
    x: np.ndarray, dy: np.ndarray, A: np.ndarray, B: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    layer = _layer(_blank(A, B), A, B, scale * A.shape[1])
    layer(to_tensor(x)).backward(to_tensor(dy))
    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return to_array(factors[0].grad.T), to_array(factors[1].grad.T)


def gradient_input(dy: np.ndarray, W: np.ndarray, A: np.ndarray, B: np.ndarray, scale: float) -> np.ndarray:
    x = to_tensor(np.zeros((*dy.shape[:-1], W.shape[0]), dy.dtype)).requires_grad_()
    _layer(W, A, B, scale * A.shape[1])(x).backward(to_tensor(dy))
    return to_array(x.grad)


FUNCTIONS = {
    f"lora.{f.__name__}": f
    for f in (scale_lora, scale_rslora, delta, apply, merge, unmerge, gradients_factored, gradient_input)
}


def implementations() -> tuple[Implementation, ...]:
    """The forward, merged and backward passes, in three formats."""
    import peft  # noqa: F401  (an adapter that is not installed must say so when it is loaded)

    version = metadata.version("peft")
    return tuple(
        Implementation("peft", FUNCTIONS, Profile(dtype, "eager" if dtype == "bfloat16" else "strict"), version)
        for dtype in ("float64", "float32", "bfloat16")
    )
