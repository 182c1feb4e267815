"""FLASH-pytorch: its GAU and FLASH modules, weights copied in.

The modules add norm and residual; the norm is replaced by the identity (the constructor takes a class) and the output
is read before the residual. The relative position bias is always there, whatever `rel_pos_bias` says: it stays as it is
built in "FLASH-pytorch", and is zeroed by hand in "FLASH-pytorch, bias zeroed".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np

from conformance.adapters import Implementation
from conformance.adapters.tensors import to_array, to_tensor
from conformance.budget import Profile
from conformance.case import Unsupported

# The module stores the four scale-offset heads as quad_q, lin_q, quad_k, lin_k; the operator names the rows of
# (quad_q, quad_k, lin_q, lin_k).
_STORED = (0, 2, 1, 3)


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(f"FLASH-pytorch {reason}")


def _dense(linear: Any, weight: np.ndarray, bias: np.ndarray | None) -> None:
    linear.weight.copy_(to_tensor(weight).T)
    linear.bias.copy_(to_tensor(np.zeros(weight.shape[1], weight.dtype) if bias is None else bias))


def _fill(module: Any, w_in: np.ndarray, b_in: np.ndarray | None, w_out: np.ndarray, b_out: np.ndarray | None) -> None:
    """The operator's columns are u, v, z; the module has [v | gate] in one layer and z in another."""
    e = w_out.shape[0]
    swap = np.r_[e : 2 * e, 0:e]
    _dense(module.to_hidden[0], w_in[:, swap], None if b_in is None else b_in[swap])
    _dense(module.to_qk[0], w_in[:, 2 * e :], None if b_in is None else b_in[2 * e :])
    out = module.to_out[0] if hasattr(module.to_out, "__len__") else module.to_out
    _dense(out, w_out, b_out)


def _built(kind: str, x: np.ndarray, w_out: np.ndarray, s: int, *, zeroed: bool, **options: Any) -> Any:
    import flash_pytorch
    import torch

    torch.manual_seed(0)
    e, d = w_out.shape
    module = getattr(flash_pytorch, kind)(
        dim=d, query_key_dim=s, expansion_factor=(e + 0.5) / d, norm_klass=lambda _: torch.nn.Identity(), **options
    ).to(to_tensor(x).dtype)
    if zeroed:
        torch.nn.init.zeros_(module.rel_pos_bias.relative_attention_bias.weight)
    return module


def unit_paper(
    zeroed: bool,
    x: np.ndarray,
    mask: np.ndarray | None,
    bias: np.ndarray | None,
    positions: np.ndarray | None,
    base: float | None,
    w_in: np.ndarray,
    b_in: np.ndarray | None,
    gamma_q: np.ndarray,
    beta_q: np.ndarray | None,
    gamma_k: np.ndarray,
    beta_k: np.ndarray | None,
    w_out: np.ndarray,
    b_out: np.ndarray | None,
    length: int,
    layout: str,
    kernel: str,
) -> np.ndarray:
    """GAU(rel_pos_bias=False) without norm and residual; it divides by the length of the array, whatever is visible."""
    import torch

    _need(positions is None, "GAU has no rotation")
    _need(bias is None, "GAU divides a given bias by the length as well")
    _need(mask is None or mask.shape[-2] == 1 or mask.ndim == 2, "GAU masks keys only")
    _need(kernel in ("squared_relu_1", "laplace"), "has squared ReLU and Laplace only")
    s = gamma_q.shape[0]
    module = _built("GAU", x, w_out, s, zeroed=zeroed, laplace_attn_fn=kernel == "laplace", add_residual=False)
    zero = np.zeros_like(gamma_q)
    with torch.no_grad():
        _fill(module, w_in, b_in, w_out, b_out)
        module.offsetscale.gamma.copy_(to_tensor(np.stack([gamma_q, gamma_k])))
        betas = [zero if b is None else b for b in (beta_q, beta_k)]
        module.offsetscale.beta.copy_(to_tensor(np.stack(betas)))
        keys = None if mask is None else to_tensor(np.broadcast_to(mask.reshape(-1, mask.shape[-1]), x.shape[:2]))
        return to_array(module(to_tensor(x), mask=keys))


def unit(
    zeroed: bool,
    x: np.ndarray,
    key_mask: np.ndarray | None,
    segments: np.ndarray | None,
    bias: np.ndarray | None,
    positions: np.ndarray | None,
    base: float | None,
    w_in: np.ndarray,
    b_in: np.ndarray | None,
    gamma: np.ndarray,
    beta: np.ndarray,
    w_out: np.ndarray,
    b_out: np.ndarray | None,
    mix: str,
    layout: str,
    rows: tuple[int, ...],
    chunk: int,
    scale: float,
    kernel: str,
    normaliser: str,
    documents: str | None,
) -> np.ndarray:
    """FLASH without norm and residual; its scale is 1 / group_size, so the rest of `scale` goes into quad_q."""
    import torch
    from rotary_embedding_torch import RotaryEmbedding

    n, s = x.shape[1], gamma.shape[-1]
    _need(segments is None and documents is None, "knows no documents")
    _need(bias is None, "takes no bias from outside")
    _need(mix in ("bidirectional", "causal"), "has no strict causal form")
    _need(kernel in ("squared_relu", "laplace"), "has squared ReLU and Laplace only")
    _need(positions is None or np.array_equal(positions, np.arange(n)), "counts positions from 0")
    _need(positions is None or layout == "interleaved", "rotates interleaved only")
    _need(normaliser in ("lucidrains", "lucidrains_causal"), "has its own normaliser only")
    _need((normaliser == "lucidrains_causal") == (mix == "causal"), "ties its normaliser to causality")
    rotary = None if positions is None else RotaryEmbedding(s, theta=base, cache_if_possible=False)
    options = {"group_size": chunk, "causal": mix == "causal", "laplace_attn_fn": kernel == "laplace"}
    module = _built("FLASH", x, w_out, s, zeroed=zeroed, rotary_pos_emb=rotary, **options)
    order = [rows[i] for i in _STORED]
    fold = np.where(np.arange(4) == 0, scale * chunk, 1.0)[:, None]
    kept: list[Any] = []
    module.to_out.register_forward_hook(lambda _, __, out: kept.append(out))
    with torch.no_grad():
        _fill(module, w_in, b_in, w_out, b_out)
        module.qk_offset_scale.gamma.copy_(to_tensor((gamma[order] * fold).astype(x.dtype)))
        module.qk_offset_scale.beta.copy_(to_tensor((beta[order] * fold).astype(x.dtype)))
        module(to_tensor(x), mask=None if key_mask is None else to_tensor(np.broadcast_to(key_mask, x.shape[:2])))
    return to_array(kept[0])


def implementations() -> tuple[Implementation, ...]:
    """As a user builds it, and with the position bias zeroed by hand; float64 (without rotation) and float32."""
    import flash_pytorch  # noqa: F401  (an adapter that is not installed must say so when it is loaded)

    version = metadata.version("FLASH-pytorch")

    def functions(zeroed: bool) -> dict[str, Callable[..., Any]]:
        return {"gau.unit_paper": partial(unit_paper, zeroed), "mixed_chunk_attention.unit": partial(unit, zeroed)}

    return (
        Implementation("FLASH-pytorch", functions(False), Profile("float32"), version),
        Implementation("FLASH-pytorch, bias zeroed", functions(True), Profile("float32"), version),
    )
