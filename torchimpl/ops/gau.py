"""The gated attention unit: one attention head without head axis whose output is multiplied by a gate.

    o = (u ⊙ A v) W_out,   [u | v | z] = silu(x W_in),   A = kernel(q kᵀ / √s),   q, k = R(γ ⊙ z + β)

Specification: refimpl/ops/gau.py. In 16 bits scores and kernels are float32. The weights return to the storage format
before they meet the values, except in float16, which squared weights leave at both ends: there A v and the gate are
float32.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from torchimpl import check
from torchimpl.ops import rope
from torchimpl.ops.activation import silu
from torchimpl.ops.attention import project
from torchimpl.ops.norm import rms_norm


class Parts(NamedTuple):
    """What the dense layer of a unit is split into."""

    gate: Float[Tensor, "*b n e"]
    value: Float[Tensor, "*b n e"]
    shared: Float[Tensor, "*b n s"]


def parts(
    x: Float[Tensor, "*b n d"], w_in: Float[Tensor, "..."], b_in: Float[Tensor, "..."] | None, *, key_width: int
) -> Parts:
    """Gate u, value v and shared representation z of a unit: [u | v | z] = silu(x W_in + b_in).

    Raises: ShapeError unless W_in has d rows and 2e + s columns for some e >= 0; DomainError for dtypes or s < 1.
    """
    check.domain("gau.parts", key_width >= 1, "key_width >= 1", key_width=key_width)
    check.real("gau.parts", "w_in", w_in)
    e = (w_in.shape[-1] - key_width) // 2 if w_in.ndim == 2 else -1
    check.shape("gau.parts", e >= 0, "w_in (d, 2e + key_width)", key_width=key_width, w_in=w_in)
    return Parts(*_activated("gau.parts", x, w_in, b_in, (e, e, key_width)))


def scale_offset(
    z: Float[Tensor, "*b s"], gamma: Float[Tensor, "..."], beta: Float[Tensor, "..."] | None
) -> Float[Tensor, "*b s"]:
    """A scale and an offset per feature, y = γ ⊙ z + β.

    Raises: ShapeError unless gamma and beta have shape (s,); DomainError for tensors that are not floating.
    """
    for name, tensor in (("z", z), ("gamma", gamma)):
        check.real("gau.scale_offset", name, tensor)
    check.shape("gau.scale_offset", z.ndim >= 1 and gamma.shape == z.shape[-1:], "gamma (s,)", z=z, gamma=gamma)
    if beta is None:
        return (gamma * z).to(z.dtype)
    check.real("gau.scale_offset", "beta", beta)
    check.shape("gau.scale_offset", beta.shape == z.shape[-1:], "beta (s,)", z=z, beta=beta)
    return torch.addcmul(beta, gamma, z).to(z.dtype)


def unit(
    x: Float[Tensor, "*b n d"],
    mask: Bool[Tensor, "..."] | None,
    bias: Float[Tensor, "..."] | None,
    positions: Int[Tensor, "..."] | None,
    frequencies: Float[Tensor, " r"] | None,
    w_in: Float[Tensor, "..."],
    b_in: Float[Tensor, "..."] | None,
    gamma_q: Float[Tensor, " s"],
    beta_q: Float[Tensor, "..."] | None,
    gamma_k: Float[Tensor, "..."],
    beta_k: Float[Tensor, "..."] | None,
    w_out: Float[Tensor, "..."],
    b_out: Float[Tensor, "..."] | None,
    *,
    rotate: Callable[..., Tensor],
    kernel: Callable[..., Tensor],
) -> Float[Tensor, "*b n _"]:
    """The gated attention unit in Su's form, A = kernel(q kᵀ / √s + bias, mask).

    Raises: ShapeError, DomainError as the parts: shapes that do not fit, dtypes, positions without frequencies.
    """
    dense, query, key = (w_in, b_in), (gamma_q, beta_q), (gamma_k, beta_k)
    u, v, q, k = _self_parts("gau.unit", x, positions, frequencies, dense, query, key, rotate)
    scores = _scores("gau.unit", q, k, 1 / math.sqrt(q.shape[-1]), bias)
    return _gated("gau.unit", u, v, scores, mask, kernel, w_out, b_out)


def unit_paper(
    x: Float[Tensor, "*b n d"],
    mask: Bool[Tensor, "..."] | None,
    bias: Float[Tensor, "..."] | None,
    positions: Int[Tensor, "..."] | None,
    frequencies: Float[Tensor, " r"] | None,
    w_in: Float[Tensor, "..."],
    b_in: Float[Tensor, "..."] | None,
    gamma_q: Float[Tensor, " s"],
    beta_q: Float[Tensor, "..."] | None,
    gamma_k: Float[Tensor, "..."],
    beta_k: Float[Tensor, "..."] | None,
    w_out: Float[Tensor, "..."],
    b_out: Float[Tensor, "..."] | None,
    *,
    length: int,
    rotate: Callable[..., Tensor],
    kernel: Callable[..., Tensor],
) -> Float[Tensor, "*b n _"]:
    """The gated attention unit in the form of the FLASH paper, A = kernel(q kᵀ / length + bias, mask).

    Raises: as `unit`; DomainError unless length >= 1.
    """
    check.domain("gau.unit_paper", length >= 1, "length >= 1", length=length)
    dense, query, key = (w_in, b_in), (gamma_q, beta_q), (gamma_k, beta_k)
    u, v, q, k = _self_parts("gau.unit_paper", x, positions, frequencies, dense, query, key, rotate)
    scores = _scores("gau.unit_paper", q, k, 1 / length, bias)
    return _gated("gau.unit_paper", u, v, scores, mask, kernel, w_out, b_out)


def unit_cross(
    x: Float[Tensor, "*b n d"],
    keys_from: Float[Tensor, "..."],
    values_from: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | None,
    bias: Float[Tensor, "..."] | None,
    positions_q: Int[Tensor, "..."] | None,
    positions_k: Int[Tensor, "..."] | None,
    frequencies: Float[Tensor, " r"] | None,
    w_in: Float[Tensor, "..."],
    b_in: Float[Tensor, "..."] | None,
    w_k: Float[Tensor, "..."],
    b_k: Float[Tensor, "..."] | None,
    w_v: Float[Tensor, "..."],
    b_v: Float[Tensor, "..."] | None,
    w_out: Float[Tensor, "..."],
    b_out: Float[Tensor, "..."] | None,
    *,
    rotate: Callable[..., Tensor],
    kernel: Callable[..., Tensor],
) -> Float[Tensor, "*b n _"]:
    """The unit as cross attention: gate and queries from x, keys and values from other sequences.

    Raises: as `unit`.
    """
    operation = "gau.unit_cross"
    k, v = silu(project(keys_from, w_k, b_k)), silu(project(values_from, w_v, b_v))
    e, s = v.shape[-1], k.shape[-1]
    check.shape(operation, s >= 1 and k.shape[:-1] == v.shape[:-1], "as many keys as values, s >= 1", k=k, v=v)
    u, q = _activated(operation, x, w_in, b_in, (e, s))
    q = _rotated(operation, "positions_q", q, positions_q, frequencies, rotate)
    k = _rotated(operation, "positions_k", k, positions_k, frequencies, rotate)
    return _gated(operation, u, v, _scores(operation, q, k, 1 / math.sqrt(s), bias), mask, kernel, w_out, b_out)


def block_post_norm(
    x: Float[Tensor, "*b n d"],
    mask: Bool[Tensor, "..."] | None,
    bias: Float[Tensor, "..."] | None,
    positions: Int[Tensor, "..."] | None,
    frequencies: Float[Tensor, " r"] | None,
    w_in: Float[Tensor, "..."],
    b_in: Float[Tensor, "..."] | None,
    gamma_q: Float[Tensor, " s"],
    beta_q: Float[Tensor, "..."] | None,
    gamma_k: Float[Tensor, "..."],
    beta_k: Float[Tensor, "..."] | None,
    w_out: Float[Tensor, "..."],
    b_out: Float[Tensor, "..."] | None,
    *,
    rotate: Callable[..., Tensor],
    kernel: Callable[..., Tensor],
    epsilon: float,
) -> Float[Tensor, "*b n d"]:
    """A layer of GAU-α: y = rms_norm(x + unit(x), epsilon).

    Raises: as `unit` and `rms_norm`; ShapeError unless W_out has d columns.
    """
    weights = (w_in, b_in, gamma_q, beta_q, gamma_k, beta_k, w_out, b_out)
    y = unit(x, mask, bias, positions, frequencies, *weights, rotate=rotate, kernel=kernel)
    return rms_norm(_residual("gau.block_post_norm", x, y), epsilon=epsilon)


def block_pre_norm(
    x: Float[Tensor, "*b n d"],
    mask: Bool[Tensor, "..."] | None,
    bias: Float[Tensor, "..."] | None,
    positions: Int[Tensor, "..."] | None,
    frequencies: Float[Tensor, " r"] | None,
    w_in: Float[Tensor, "..."],
    b_in: Float[Tensor, "..."] | None,
    gamma_q: Float[Tensor, " s"],
    beta_q: Float[Tensor, "..."] | None,
    gamma_k: Float[Tensor, "..."],
    beta_k: Float[Tensor, "..."] | None,
    w_out: Float[Tensor, "..."],
    b_out: Float[Tensor, "..."] | None,
    *,
    length: int,
    rotate: Callable[..., Tensor],
    kernel: Callable[..., Tensor],
    norm: Callable[[Tensor], Tensor],
) -> Float[Tensor, "*b n d"]:
    """A layer of FLASH-Quad: y = x + unit_paper(norm(x)).

    Raises: as `unit_paper` and `norm`; ShapeError unless W_out has d columns.
    """
    check.real("gau.block_pre_norm", "x", x)
    weights = (w_in, b_in, gamma_q, beta_q, gamma_k, beta_k, w_out, b_out)
    arrays = (mask, bias, positions, frequencies, *weights)
    y = unit_paper(norm(x), *arrays, length=length, rotate=rotate, kernel=kernel)
    return _residual("gau.block_pre_norm", x, y)


def _activated(operation: str, x: Tensor, w: Tensor, b: Tensor | None, widths: tuple[int, ...]) -> list[Tensor]:
    """silu(x W + b) in blocks of columns. W is cut, not the result: its gradient is the smaller one to put together."""
    given = {"x": x, "w_in": w} if b is None else {"x": x, "w_in": w, "b_in": b}
    for name, tensor in given.items():
        check.real(operation, name, tensor)
    fits = x.ndim >= 1 and tuple(w.shape) == (x.shape[-1], sum(widths)) and (b is None or b.shape == w.shape[1:])
    check.shape(operation, fits, "x (..., d), w_in (d, widths), b_in (widths,)", widths=widths, **given)
    biases = (None,) * len(widths) if b is None else b.split(widths)
    return [silu(project(x, *block)) for block in zip(w.split(widths, dim=1), biases, strict=True)]


def _self_parts(
    operation: str,
    x: Tensor,
    positions: Tensor | None,
    frequencies: Tensor | None,
    dense: tuple[Tensor, Tensor | None],
    query: tuple[Tensor, Tensor | None],
    key: tuple[Tensor, Tensor | None],
    rotate: Callable[..., Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gamma_q = check.real(operation, "gamma_q", query[0])
    check.shape(operation, gamma_q.ndim == 1, "gamma_q (s,)", gamma_q=gamma_q)
    u, v, z = parts(x, *dense, key_width=gamma_q.shape[0])
    q, k = scale_offset(z, *query), scale_offset(z, *key)
    q = _rotated(operation, "positions", q, positions, frequencies, rotate)
    return u, v, q, _rotated(operation, "positions", k, positions, frequencies, rotate)


def _rotated(
    operation: str,
    name: str,
    x: Tensor,
    positions: Tensor | None,
    frequencies: Tensor | None,
    rotate: Callable[..., Tensor],
) -> Tensor:
    lacking = positions is not None and frequencies is None
    check.domain(operation, not lacking, f"frequencies for {name}", frequencies=frequencies)
    if positions is None or frequencies is None:
        return x
    return rotate(x, rope.angles(positions, frequencies))


def _scores(operation: str, q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    fits = min(q.ndim, k.ndim) >= 2 and q.shape[:-2] == k.shape[:-2] and q.shape[-1] == k.shape[-1]
    check.shape(operation, fits, "queries (*b, n, s) and keys (*b, m, s)", queries=q, keys=k)
    # Scaling the queries spares a pass over all pairs.
    scores = (check.island(q) * scale) @ check.island(k).mT
    if bias is None:
        return scores
    check.real(operation, "bias", bias)
    fits = check.broadcasts(bias.shape, scores.shape)
    check.shape(operation, fits, "a bias that broadcasts to the scores (*b, n, m)", scores=scores, bias=bias)
    return scores + bias


def _gated(
    operation: str,
    u: Tensor,
    v: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    kernel: Callable[..., Tensor],
    w_out: Tensor,
    b_out: Tensor | None,
) -> Tensor:
    if mask is not None:
        check.boolean(operation, "mask", mask)
        # A (b, m) mask would be read as (n, m); padding must come as (b, 1, m).
        fits = mask.ndim == scores.ndim or mask.shape == scores.shape[-2:]
        check.shape(operation, fits, "a mask (n, m) or one with every axis of the scores", scores=scores, mask=mask)
    weights = kernel(scores, mask)
    # bfloat16 has the range of float32, float16 has not.
    mixed = weights @ v.float() if v.dtype == torch.float16 else weights.to(v.dtype) @ v
    return project((u * mixed).to(u.dtype), w_out, b_out)


def _residual(operation: str, x: Tensor, y: Tensor) -> Tensor:
    check.real(operation, "x", x)
    check.shape(operation, x.shape == y.shape, "a unit that ends in the width of x", x=x, unit=y)
    return x + y
