"""PyTorch's own kernels on the CPU: norms, softmax, activations, fused attention, optimisers, autograd.

Each mapping calls the kernel that PyTorch ships for an operator; what PyTorch has no kernel for is not claimed.
16-bit formats are declared as each kernel computes: strict where it works in float32 and rounds once (the math backend
of scaled_dot_product_attention does), fused for its flash backend, eager where several kernels stand in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from conformance.adapters import Implementation
from conformance.adapters.tensors import on_arrays
from conformance.budget import DTYPES, Profile
from conformance.case import Function, Unsupported

# torch.Tensor, which only a running adapter may import.
Tensor = Any


# Activations.
def relu(x: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.relu(x)


def silu(x: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.silu(x)


def gelu_erf(x: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.gelu(x, approximate="tanh")


def elu_plus_one(x: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.elu(x) + 1


# Norms.
def rms_norm(x: Tensor, epsilon: float, scale: Tensor | None = None) -> Tensor:
    import torch

    return torch.nn.functional.rms_norm(x, x.shape[-1:], scale, eps=epsilon)


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    import torch

    return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, bias, eps=epsilon)


# Attention.
def softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    import torch

    visible = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return torch.nn.functional.softmax(visible, dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: str, scale: float, *, backend: str) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import pad, scaled_dot_product_attention

    if kernel != "softmax":
        raise Unsupported("scaled_dot_product_attention has the softmax kernel only")
    # The flash kernel wants one width for keys and values; features that are zero change no score.
    d, e = q.shape[-1], v.shape[-1]
    q, k, v = (pad(x, (0, max(d, e) - x.shape[-1])).transpose(-3, -2) for x in (q, k, v))
    with sdpa_kernel([SDPBackend.__members__[backend]]):
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[-3] != k.shape[-3])
    return y.transpose(-3, -2)[..., :e]


def project(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    import torch

    return torch.nn.functional.linear(x, w.T, b)


def classify(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    return project(x, kernel, bias)


def pooler_linear(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    return project(x[..., 0, :], kernel, bias)


# Rotary embedding: torch.onnx.ops.rotary_embedding, run eagerly, with tables of exact angles.
def rotate(x: Tensor, positions: Tensor, base: float, layout: str, rotary_width: int | None = None) -> Tensor:
    width = x.shape[-1] if rotary_width is None else rotary_width
    return _rotary(x, _angles(x, positions, width, base), interleaved=layout == "interleaved")


def rotate_proportional(x: Tensor, positions: Tensor, base: float, rotary_width: int) -> Tensor:
    phi = _angles(x, positions, x.shape[-1], base)
    # The pairs that pass through turn by an angle of zero.
    phi[..., rotary_width // 2 :] = 0
    return _rotary(x, phi, interleaved=False)


def _angles(x: Tensor, positions: Tensor, width: int, base: float) -> Tensor:
    import torch

    theta = base ** (-2.0 * torch.arange(width // 2, dtype=torch.float64) / max(width, 1))
    return (positions[..., None] * theta).expand(*x.shape[:2], -1).clone()


def _rotary(x: Tensor, phi: Tensor, *, interleaved: bool) -> Tensor:
    import torch

    cos, sin = phi.cos().to(x.dtype), phi.sin().to(x.dtype)
    width = 2 * phi.shape[-1]
    made = torch.onnx.ops.rotary_embedding(
        x.transpose(1, 2), cos, sin, interleaved=interleaved, rotary_embedding_dim=width
    )
    return made.transpose(1, 2)


# Low-rank adaptation: dense layers, autograd and the optimisers.
def lora_delta(A: Tensor, B: Tensor, scale: float) -> Tensor:
    return scale * (A @ B)


def lora_apply(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    import torch

    linear = torch.nn.functional.linear
    return linear(x, W.T) + scale * linear(linear(x, A.T), B.T)


def lora_merge(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    import torch

    return torch.addmm(W, A, B, alpha=scale)


def lora_unmerge(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    import torch

    return torch.addmm(W, A, B, alpha=-scale)


def gradients_dense(G: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, ...]:
    return _gradients(lambda A, B: scale * (A @ B), G, A, B)


def gradients_factored(x: Tensor, dy: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, ...]:
    import torch

    linear = torch.nn.functional.linear
    return _gradients(lambda A, B: scale * linear(linear(x, A.T), B.T), dy, A, B)


def gradient_input(dy: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    x = dy.new_zeros(*dy.shape[:-1], W.shape[0])
    return _gradients(lambda x: lora_apply(x, W, A, B, scale), dy, x)[0]


def _gradients(forward: Callable[..., Tensor], upstream: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """The gradients of <upstream, forward(*leaves)> by PyTorch's autograd."""
    import torch

    with torch.enable_grad():
        leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
        return torch.autograd.grad(forward(*leaves), leaves, upstream)


def sgd(A: Tensor, B: Tensor, G: Tensor, scale: float, learning_rate: float) -> tuple[Tensor, ...]:
    import torch

    factors = (A.clone(), B.clone())
    for factor, gradient in zip(factors, gradients_dense(G, A, B, scale), strict=True):
        factor.grad = gradient
    torch.optim.SGD(factors, lr=learning_rate).step()
    return factors


def sgd_frozen(A: Tensor, B: Tensor, G: Tensor, scale: float, learning_rate: float) -> Tensor:
    import torch

    B = B.clone()
    B.grad = gradients_dense(G, A, B, scale)[1]
    torch.optim.SGD([B], lr=learning_rate).step()
    return B


def adamw_array(
    parameter: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: int, beta_1: float, beta_2: float, **options: float
) -> tuple[Tensor, ...]:
    import torch

    parameter = parameter.clone()
    parameter.grad = gradient
    optimiser = torch.optim.AdamW(
        [parameter],
        lr=options["learning_rate"],
        betas=(beta_1, beta_2),
        eps=options["epsilon"],
        weight_decay=options["weight_decay"],
    )
    state = {"step": torch.tensor(float(step - 1)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimiser.state[parameter] = state
    optimiser.step()
    return parameter, state["exp_avg"], state["exp_avg_sq"]


def adamw(
    A: Tensor,
    B: Tensor,
    G: Tensor,
    m_A: Tensor,
    v_A: Tensor,
    m_B: Tensor,
    v_B: Tensor,
    scale: float,
    **options: Any,
) -> tuple[Tensor, ...]:
    dA, dB = gradients_dense(G, A, B, scale)
    new_A, new_B = adamw_array(A, dA, m_A, v_A, **options), adamw_array(B, dB, m_B, v_B, **options)
    return new_A[0], new_B[0], *new_A[1:], *new_B[1:]


# One kernel, which works in float32 or better and rounds once.
SINGLE: dict[str, Function] = {
    "activation.relu": relu,
    "activation.silu": silu,
    "activation.gelu_erf": gelu_erf,
    "activation.gelu_tanh": gelu_tanh,
    "norm.rms_norm": rms_norm,
    "norm.rms_norm_scaled": rms_norm,
    "norm.layer_norm": layer_norm,
    "attention_kernel.softmax": softmax,
    "attention.project": project,
    "head.classify": classify,
    "pooling.pooler_linear": pooler_linear,
    "lora.merge": lora_merge,
    "lora.unmerge": lora_unmerge,
}
# Kernels in a row: in 16 bits, what lies between them is rounded.
COMPOSED: dict[str, Function] = {
    "activation.elu_plus_one": elu_plus_one,
    "rope.rotate_interleaved": partial(rotate, layout="interleaved"),
    "rope.rotate_half_split": partial(rotate, layout="half_split"),
    "rope.rotate_contiguous": rotate,
    "rope.rotate_proportional": rotate_proportional,
    "lora.delta": lora_delta,
    "lora.apply": lora_apply,
    "lora.gradients_dense": gradients_dense,
    "lora.gradients_factored": gradients_factored,
    "lora.gradient_input": gradient_input,
    "lora.sgd": sgd,
    "lora.sgd_frozen": sgd_frozen,
    "lora.adamw_array": adamw_array,
    "lora.adamw": adamw,
}


def implementations() -> tuple[Implementation, ...]:
    """Every kernel in the formats it has; in 16 bits under the arithmetic that it declares."""
    import torch

    # One order of summation on every machine, and no threads that wait for each other beside the judge's processes.
    torch.set_num_threads(1)

    def made(name: str, dtype: str, profile: str, functions: dict[str, Function]) -> Implementation:
        called = {op: on_arrays(f) for op, f in functions.items()}
        return Implementation(name, called, Profile(dtype, profile, "A64"), torch.__version__)

    flash: dict[str, Function] = {"attention.attend": partial(attend, backend="FLASH_ATTENTION")}
    plain: dict[str, Function] = {"attention.attend": partial(attend, backend="MATH")}
    found = []
    for dtype in DTYPES:
        if Profile(dtype).sixteen_bit:
            found.append(made("torch", dtype, "strict", SINGLE | plain))
            found.append(made("torch, flash backend", dtype, "fused", flash))
            found.append(made("torch, composed", dtype, "eager", COMPOSED))
        else:
            found.append(made("torch", dtype, "strict", SINGLE | COMPOSED | plain))
            found.append(made("torch, flash backend", dtype, "strict", flash))
    return tuple(found)
