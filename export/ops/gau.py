"""The gated attention unit: one attention head without head axis whose output is multiplied by a gate.

    o = (u ⊙ A v) W_out,   [u | v | z] = silu(x W_in),   A = kernel(q kᵀ / √s),   q, k = R(γ ⊙ z + β)

Specification: refimpl/ops/gau.py. What divides the scores divides the queries' γ and β, so that no pass over the
scores is spent on it; the dense layer stays one product, whose weight can be quantised.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from export import check
from export.graph import Value, function
from export.ops import rope
from export.ops.activation import silu
from export.ops.attention import project
from export.ops.norm import rms_norm
from export.special import scaled


class Parts(NamedTuple):
    """What the dense layer of a unit is split into."""

    gate: Value
    value: Value
    shared: Value


@function
def parts(x: Value, w_in: Value, b_in: Value | None, *, key_width: int) -> Parts:
    """Gate u, value v and shared representation z of a unit, from one dense layer."""
    check.domain("gau.parts", key_width >= 1, "key_width >= 1", key_width=key_width)
    e, rest = divmod(int(w_in.shape[-1]) - key_width, 2)
    check.shape("gau.parts", e >= 0 and rest == 0, f"w_in of 2e + {key_width} columns", w_in=w_in)
    whole = silu(project(x, w_in, b_in))
    return Parts(whole[..., :e], whole[..., e : 2 * e], whole[..., 2 * e :])


@function
def scale_offset(z: Value, gamma: Value, beta: Value | None) -> Value:
    """A scale and an offset per feature: how queries and keys are told apart."""
    for name, values in (("gamma", gamma), ("beta", beta)):
        if values is not None:
            check.real("gau.scale_offset", name, values)
            fits = z.ndim >= 1 and values.ndim == 1 and int(values.shape[0]) == int(z.shape[-1])
            check.shape("gau.scale_offset", fits, f"{name} (s,)", z=z, received=values)
    return z * gamma if beta is None else z * gamma + beta


@function
def unit(
    x: Value,
    mask: Value | None,
    bias: Value | None,
    positions: Value | None,
    frequencies: Value | None,
    w_in: Value,
    b_in: Value | None,
    gamma_q: Value,
    beta_q: Value | None,
    gamma_k: Value,
    beta_k: Value | None,
    w_out: Value,
    b_out: Value | None,
    *,
    rotate: Callable[..., Value],
    kernel: Callable[..., Value],
) -> Value:
    """The gated attention unit in Su's form: scores over √s."""
    check.shape("gau.unit", gamma_q.ndim == 1, "gamma_q (s,)", gamma_q=gamma_q)
    divisor = math.sqrt(int(gamma_q.shape[0]))
    dense, query, key = (w_in, b_in), (gamma_q, beta_q), (gamma_k, beta_k)
    u, v, q, k = _self_parts("gau.unit", x, positions, frequencies, dense, query, key, divisor, rotate)
    return _gated("gau.unit", u, v, q, k, mask, bias, kernel, w_out, b_out)


@function
def unit_paper(
    x: Value,
    mask: Value | None,
    bias: Value | None,
    positions: Value | None,
    frequencies: Value | None,
    w_in: Value,
    b_in: Value | None,
    gamma_q: Value,
    beta_q: Value | None,
    gamma_k: Value,
    beta_k: Value | None,
    w_out: Value,
    b_out: Value | None,
    *,
    length: int,
    rotate: Callable[..., Value],
    kernel: Callable[..., Value],
) -> Value:
    """The gated attention unit in the form of the FLASH paper: scores over a length."""
    check.domain("gau.unit_paper", length >= 1, "length >= 1", length=length)
    check.shape("gau.unit_paper", gamma_q.ndim == 1, "gamma_q (s,)", gamma_q=gamma_q)
    dense, query, key = (w_in, b_in), (gamma_q, beta_q), (gamma_k, beta_k)
    u, v, q, k = _self_parts("gau.unit_paper", x, positions, frequencies, dense, query, key, float(length), rotate)
    return _gated("gau.unit_paper", u, v, q, k, mask, bias, kernel, w_out, b_out)


@function
def unit_cross(
    x: Value,
    keys_from: Value,
    values_from: Value,
    mask: Value | None,
    bias: Value | None,
    positions_q: Value | None,
    positions_k: Value | None,
    frequencies: Value | None,
    w_in: Value,
    b_in: Value | None,
    w_k: Value,
    b_k: Value | None,
    w_v: Value,
    b_v: Value | None,
    w_out: Value,
    b_out: Value | None,
    *,
    rotate: Callable[..., Value],
    kernel: Callable[..., Value],
) -> Value:
    """The unit as cross attention: gate and queries from x, keys and values from other sequences."""
    operation = "gau.unit_cross"
    e, s = int(w_v.shape[-1]), int(w_k.shape[-1])
    fits = s >= 1 and int(w_in.shape[-1]) == e + s and check.same(keys_from.shape[:-1], values_from.shape[:-1])
    sources = {"keys_from": keys_from, "values_from": values_from}
    expected = "w_in of e + s columns, as many keys as values"
    check.shape(operation, fits, expected, w_in=w_in, w_k=w_k, w_v=w_v, **sources)
    k, v = silu(project(keys_from, w_k, b_k)), silu(project(values_from, w_v, b_v))
    whole = silu(project(x, w_in, b_in))
    u, q = whole[..., :e], scaled(whole[..., e:], 1 / math.sqrt(s))
    q = _rotated(operation, "positions_q", q, positions_q, frequencies, rotate)
    k = _rotated(operation, "positions_k", k, positions_k, frequencies, rotate)
    return _gated(operation, u, v, q, k, mask, bias, kernel, w_out, b_out)


@function
def block_post_norm(
    x: Value,
    mask: Value | None,
    bias: Value | None,
    positions: Value | None,
    frequencies: Value | None,
    w_in: Value,
    b_in: Value | None,
    gamma_q: Value,
    beta_q: Value | None,
    gamma_k: Value,
    beta_k: Value | None,
    w_out: Value,
    b_out: Value | None,
    *,
    rotate: Callable[..., Value],
    kernel: Callable[..., Value],
    epsilon: float,
) -> Value:
    """A layer of GAU-α: the sum of input and unit is normalised."""
    weights = (w_in, b_in, gamma_q, beta_q, gamma_k, beta_k, w_out, b_out)
    y = unit(x, mask, bias, positions, frequencies, *weights, rotate=rotate, kernel=kernel)
    return rms_norm(_residual("gau.block_post_norm", x, y), epsilon=epsilon)


@function
def block_pre_norm(
    x: Value,
    mask: Value | None,
    bias: Value | None,
    positions: Value | None,
    frequencies: Value | None,
    w_in: Value,
    b_in: Value | None,
    gamma_q: Value,
    beta_q: Value | None,
    gamma_k: Value,
    beta_k: Value | None,
    w_out: Value,
    b_out: Value | None,
    *,
    length: int,
    rotate: Callable[..., Value],
    kernel: Callable[..., Value],
    norm: Callable[[Value], Value],
) -> Value:
    """A layer of FLASH-Quad: the unit sees a normalised input, the residual path does not."""
    check.real("gau.block_pre_norm", "x", x)
    weights = (w_in, b_in, gamma_q, beta_q, gamma_k, beta_k, w_out, b_out)
    values = (mask, bias, positions, frequencies, *weights)
    y = unit_paper(norm(x), *values, length=length, rotate=rotate, kernel=kernel)
    return _residual("gau.block_pre_norm", x, y)


def _self_parts(
    operation: str,
    x: Value,
    positions: Value | None,
    frequencies: Value | None,
    dense: tuple[Value, Value | None],
    query: tuple[Value, Value | None],
    key: tuple[Value, Value | None],
    divisor: float,
    rotate: Callable[..., Value],
) -> tuple[Value, Value, Value, Value]:
    u, v, z = parts(x, *dense, key_width=int(query[0].shape[0]))
    gamma, beta = query
    gamma, beta = gamma * (1 / divisor), None if beta is None else beta * (1 / divisor)
    q, k = scale_offset(z, gamma, beta), scale_offset(z, *key)
    q = _rotated(operation, "positions", q, positions, frequencies, rotate)
    return u, v, q, _rotated(operation, "positions", k, positions, frequencies, rotate)


def _rotated(
    operation: str,
    name: str,
    x: Value,
    positions: Value | None,
    frequencies: Value | None,
    rotate: Callable[..., Value],
) -> Value:
    lacking = positions is not None and frequencies is None
    check.domain(operation, not lacking, f"frequencies for {name}", frequencies=frequencies)
    if positions is None or frequencies is None:
        return x
    return rotate(x, rope.angles(positions, frequencies))


def _gated(
    operation: str,
    u: Value,
    v: Value,
    q: Value,
    k: Value,
    mask: Value | None,
    bias: Value | None,
    kernel: Callable[..., Value],
    w_out: Value,
    b_out: Value | None,
) -> Value:
    fits = min(q.ndim, k.ndim) >= 2 and check.same(q.shape[:-2], k.shape[:-2])
    fits = fits and int(q.shape[-1]) == int(k.shape[-1])
    check.shape(operation, fits, "queries (*b, n, s) and keys (*b, m, s)", queries=q, keys=k)
    scores = q @ k.swap(-2, -1)
    if bias is not None:
        check.real(operation, "bias", bias)
        fits = check.broadcasts(bias.shape, scores.shape)
        check.shape(operation, fits, "a bias that broadcasts to the scores (*b, n, m)", scores=scores, bias=bias)
        scores = scores + bias
    if mask is not None:
        check.boolean(operation, "mask", mask)
        # A (b, m) mask would be read as (n, m); padding must come as (b, 1, m).
        fits = mask.ndim == scores.ndim or check.same(mask.shape, scores.shape[-2:])
        check.shape(operation, fits, "a mask (n, m) or one with every axis of the scores", scores=scores, mask=mask)
    return project(u * (kernel(scores, mask) @ v), w_out, b_out)


def _residual(operation: str, x: Value, y: Value) -> Value:
    fits = check.same(x.shape, y.shape) and int(x.shape[-1]) == int(y.shape[-1])
    check.shape(operation, fits, "a unit that ends in the width of x", x=x, unit=y)
    return x + y
