"""The gated attention unit: one attention head without head axis whose output is multiplied by a gate.

    o = (u ⊙ A v) W_out,   [u | v | z] = silu(x W_in),   A = kernel(q kᵀ / √s),   q, k = R(γ ⊙ z + β)

Source: Hua et al., arXiv:2202.10447 (`unit_paper`, `block_pre_norm`); https://kexue.fm/archives/8934 and GAU-α,
https://kexue.fm/archives/9052 (`unit`, `block_post_norm`)

| | `unit` (Su) | `unit_paper` |
| scores | q kᵀ / √s + bias | q kᵀ / length + bias |
| kernel | squared_relu_visible, softmax_plus | squared_relu_constant with length 1, or laplace |
| rotation | interleaved, the only position | half split, beside the additive bias |
| block | x + unit(x), then rms_norm | x + unit(norm(x)) |

Both order the columns of W_in as u, v, z and activate all three. lucidrains/FLASH-pytorch has v before u, a dense layer
of its own for z, and divides its bias by the length too. `bias` is added to the scores and never counts as a mask.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from refimpl import check
from refimpl.ops import rope
from refimpl.ops.activation import silu
from refimpl.ops.attention import project
from refimpl.ops.norm import rms_norm


class Parts(NamedTuple):
    """What the dense layer of a unit is split into."""

    gate: Float[np.ndarray, "*b n e"]
    value: Float[np.ndarray, "*b n e"]
    shared: Float[np.ndarray, "*b n s"]


def parts(
    x: Shaped[np.ndarray, "*b n d"],
    w_in: Shaped[np.ndarray, "..."],
    b_in: Shaped[np.ndarray, "..."] | None,
    *,
    key_width: int,
) -> Parts:
    """Gate u, value v and shared representation z of a unit, from one dense layer.

    [u | v | z] = silu(x W_in + b_in),   widths e, e and s = key_width

    C1. The columns must be split in the order u, v, z.
    C2. The activation must act on all three parts.
    Raises: ShapeError unless W_in has d rows and 2e + s columns for some e >= 0; DomainError for NaN, infinity, s < 1.
    Precision: silu has slope below 1.1, so the error of the dense layer passes at most 1.1 times.
    Source: arXiv:2202.10447, appendix; https://kexue.fm/archives/8934.
    """
    check.domain("gau.parts", key_width >= 1, "key_width >= 1", key_width=key_width)
    whole = silu(project(x, w_in, b_in))
    e, rest = divmod(whole.shape[-1] - key_width, 2)
    check.shape("gau.parts", e >= 0 and rest == 0, f"w_in of 2e + {key_width} columns", w_in=np.asarray(w_in))
    return Parts(whole[..., :e], whole[..., e : 2 * e], whole[..., 2 * e :])


def scale_offset(
    z: Shaped[np.ndarray, "*b s"], gamma: Shaped[np.ndarray, "..."], beta: Shaped[np.ndarray, "..."] | None
) -> Float[np.ndarray, "*b s"]:
    """A scale and an offset per feature: how queries and keys are told apart.

    y = γ ⊙ z + β

    C1. Every feature must have its own scale and offset; a rotation comes after, it does not commute with them.
    C2. beta = None must add nothing.
    Raises: ShapeError unless gamma and beta have shape (s,); DomainError for NaN or infinity.
    Precision: against |γ||z| + |β|.
    """
    z = check.real("gau.scale_offset", "z", z)
    gamma = check.real("gau.scale_offset", "gamma", gamma)
    check.shape("gau.scale_offset", z.ndim >= 1 and gamma.shape == z.shape[-1:], "gamma (s,)", z=z, gamma=gamma)
    if beta is None:
        return gamma * z
    beta = check.real("gau.scale_offset", "beta", beta)
    check.shape("gau.scale_offset", beta.shape == z.shape[-1:], "beta (s,)", z=z, beta=beta)
    return gamma * z + beta


def unit(
    x: Shaped[np.ndarray, "*b n d"],
    mask: Shaped[np.ndarray, "..."] | None,
    bias: Shaped[np.ndarray, "..."] | None,
    positions: Shaped[np.ndarray, "..."] | None,
    frequencies: Shaped[np.ndarray, " r"] | None,
    w_in: Shaped[np.ndarray, "..."],
    b_in: Shaped[np.ndarray, "..."] | None,
    gamma_q: Shaped[np.ndarray, " s"],
    beta_q: Shaped[np.ndarray, "..."] | None,
    gamma_k: Shaped[np.ndarray, "..."],
    beta_k: Shaped[np.ndarray, "..."] | None,
    w_out: Shaped[np.ndarray, "..."],
    b_out: Shaped[np.ndarray, "..."] | None,
    *,
    rotate: Callable[..., np.ndarray],
    kernel: Callable[..., np.ndarray],
) -> Float[np.ndarray, "*b n _"]:
    """The gated attention unit in Su's form.

    o = (u ⊙ A v) W_out + b_out,   A = kernel(q kᵀ / √s + bias, mask)

    C1. The scores must be divided by √s before the kernel; the bias is not.
    C2. With a kernel that counts visible keys, appending masked keys must change nothing on real tokens.
    C3. A common shift of all positions must change nothing; positions = None must rotate nothing.
    C4. A token that sees no key must get b_out, or zeros without it.
    C5. With A = 1 it must be a gated linear unit, with u = 1 plain attention: u multiplies before W_out.
    Raises: ShapeError, DomainError as the parts: shapes that do not fit, NaN, infinity, masks that are not boolean.
    Precision: chained: dense, silu, rotation, scores against Σ|q||k|/√s, kernel, Σ|A||v|, gate, dense.
    Source: https://kexue.fm/archives/8934; bert4keras (GatedAttentionUnit).
    Differs: `unit_paper`. GAU-α has neither biases nor beta and softmax_plus for a kernel.
    """
    dense, query, key = (w_in, b_in), (gamma_q, beta_q), (gamma_k, beta_k)
    u, v, q, k = _self_parts("gau.unit", x, positions, frequencies, dense, query, key, rotate)
    scores = _products("gau.unit", q, k) / math.sqrt(q.shape[-1])
    return _gated("gau.unit", u, v, scores, mask, bias, kernel, w_out, b_out)


def unit_paper(
    x: Shaped[np.ndarray, "*b n d"],
    mask: Shaped[np.ndarray, "..."] | None,
    bias: Shaped[np.ndarray, "..."] | None,
    positions: Shaped[np.ndarray, "..."] | None,
    frequencies: Shaped[np.ndarray, " r"] | None,
    w_in: Shaped[np.ndarray, "..."],
    b_in: Shaped[np.ndarray, "..."] | None,
    gamma_q: Shaped[np.ndarray, " s"],
    beta_q: Shaped[np.ndarray, "..."] | None,
    gamma_k: Shaped[np.ndarray, "..."],
    beta_k: Shaped[np.ndarray, "..."] | None,
    w_out: Shaped[np.ndarray, "..."],
    b_out: Shaped[np.ndarray, "..."] | None,
    *,
    length: int,
    rotate: Callable[..., np.ndarray],
    kernel: Callable[..., np.ndarray],
) -> Float[np.ndarray, "*b n _"]:
    """The gated attention unit in the form of the FLASH paper: scores are divided by a length, not by √s.

    o = (u ⊙ A v) W_out + b_out,   A = kernel(q kᵀ / length + bias, mask)

    C1. `length` must divide before the square, so with squared_relu_constant of length 1 weights fall as 1/length².
    C2. The bias must be added after the division and must not be divided.
    C3. There must be no √s.
    C4. positions = None must rotate nothing; a token that sees no key must get b_out, or zeros without it.
    Raises: as `unit`; DomainError unless length >= 1.
    Precision: as `unit`, with scores against Σ|q||k|/length.
    Source: arXiv:2202.10447, appendix. The paper says nothing on padding.
    Differs: lucidrains/FLASH-pytorch takes the padded array length and divides its bias by it too: pass bias / length;
        JunnYu/FLASHQuad_pytorch takes max_position, 512.
    """
    check.domain("gau.unit_paper", length >= 1, "length >= 1", length=length)
    dense, query, key = (w_in, b_in), (gamma_q, beta_q), (gamma_k, beta_k)
    u, v, q, k = _self_parts("gau.unit_paper", x, positions, frequencies, dense, query, key, rotate)
    scores = _products("gau.unit_paper", q, k) / length
    return _gated("gau.unit_paper", u, v, scores, mask, bias, kernel, w_out, b_out)


def unit_cross(
    x: Shaped[np.ndarray, "*b n d"],
    keys_from: Shaped[np.ndarray, "..."],
    values_from: Shaped[np.ndarray, "..."],
    mask: Shaped[np.ndarray, "..."] | None,
    bias: Shaped[np.ndarray, "..."] | None,
    positions_q: Shaped[np.ndarray, "..."] | None,
    positions_k: Shaped[np.ndarray, "..."] | None,
    frequencies: Shaped[np.ndarray, " r"] | None,
    w_in: Shaped[np.ndarray, "..."],
    b_in: Shaped[np.ndarray, "..."] | None,
    w_k: Shaped[np.ndarray, "..."],
    b_k: Shaped[np.ndarray, "..."] | None,
    w_v: Shaped[np.ndarray, "..."],
    b_v: Shaped[np.ndarray, "..."] | None,
    w_out: Shaped[np.ndarray, "..."],
    b_out: Shaped[np.ndarray, "..."] | None,
    *,
    rotate: Callable[..., np.ndarray],
    kernel: Callable[..., np.ndarray],
) -> Float[np.ndarray, "*b n _"]:
    """The unit as cross attention: gate and queries from x, keys and values from other sequences.

    o = (u ⊙ A v) W_out + b_out,   [u | q] = silu(x W_in + b_in),   k = silu(y W_k + b_k),   v = silu(y' W_v + b_v)

    C1. Every dense layer must be activated and there must be no scale-offset.
    C2. Columns must be in the order u, q.
    C3. A side without positions must not be rotated.
    C4. The scores must be divided by √s.
    Raises, Precision: as `unit`.
    Source: bert4keras (GatedAttentionUnit on three inputs, since August 2022).
    """
    operation = "gau.unit_cross"
    k, v = silu(project(keys_from, w_k, b_k)), silu(project(values_from, w_v, b_v))
    whole = silu(project(x, w_in, b_in))
    e, s = v.shape[-1], k.shape[-1]
    fits = s >= 1 and whole.shape[-1] == e + s and k.shape[:-1] == v.shape[:-1]
    check.shape(operation, fits, "w_in of e + s columns, as many keys as values", u_and_q=whole, k=k, v=v)
    u, q = whole[..., :e], whole[..., e:]
    q = _rotated(operation, "positions_q", q, positions_q, frequencies, rotate)
    k = _rotated(operation, "positions_k", k, positions_k, frequencies, rotate)
    return _gated(operation, u, v, _products(operation, q, k) / math.sqrt(s), mask, bias, kernel, w_out, b_out)


def block_post_norm(
    x: Shaped[np.ndarray, "*b n d"],
    mask: Shaped[np.ndarray, "..."] | None,
    bias: Shaped[np.ndarray, "..."] | None,
    positions: Shaped[np.ndarray, "..."] | None,
    frequencies: Shaped[np.ndarray, " r"] | None,
    w_in: Shaped[np.ndarray, "..."],
    b_in: Shaped[np.ndarray, "..."] | None,
    gamma_q: Shaped[np.ndarray, " s"],
    beta_q: Shaped[np.ndarray, "..."] | None,
    gamma_k: Shaped[np.ndarray, "..."],
    beta_k: Shaped[np.ndarray, "..."] | None,
    w_out: Shaped[np.ndarray, "..."],
    b_out: Shaped[np.ndarray, "..."] | None,
    *,
    rotate: Callable[..., np.ndarray],
    kernel: Callable[..., np.ndarray],
    epsilon: float,
) -> Float[np.ndarray, "*b n d"]:
    """A layer of GAU-α: the sum of input and unit is normalised.

    y = rms_norm(x + unit(x), epsilon)

    C1. The norm must come after the residual sum, and the residual path must not be normalised before it.
    Raises: as `unit` and `rms_norm`; ShapeError unless W_out has d columns.
    Precision: `unit`, one addition, `rms_norm`.
    Source: https://kexue.fm/archives/9052. Epsilon: see `rms_norm`.
    """
    weights = (w_in, b_in, gamma_q, beta_q, gamma_k, beta_k, w_out, b_out)
    y = unit(x, mask, bias, positions, frequencies, *weights, rotate=rotate, kernel=kernel)
    return rms_norm(_residual("gau.block_post_norm", x, y), epsilon=epsilon)


def block_pre_norm(
    x: Shaped[np.ndarray, "*b n d"],
    mask: Shaped[np.ndarray, "..."] | None,
    bias: Shaped[np.ndarray, "..."] | None,
    positions: Shaped[np.ndarray, "..."] | None,
    frequencies: Shaped[np.ndarray, " r"] | None,
    w_in: Shaped[np.ndarray, "..."],
    b_in: Shaped[np.ndarray, "..."] | None,
    gamma_q: Shaped[np.ndarray, " s"],
    beta_q: Shaped[np.ndarray, "..."] | None,
    gamma_k: Shaped[np.ndarray, "..."],
    beta_k: Shaped[np.ndarray, "..."] | None,
    w_out: Shaped[np.ndarray, "..."],
    b_out: Shaped[np.ndarray, "..."] | None,
    *,
    length: int,
    rotate: Callable[..., np.ndarray],
    kernel: Callable[..., np.ndarray],
    norm: Callable[[np.ndarray], np.ndarray],
) -> Float[np.ndarray, "*b n d"]:
    """A layer of FLASH-Quad: the unit sees a normalised input, the residual path does not.

    y = x + unit_paper(norm(x))

    C1. The input must be added as it came, not as it was normalised.
    C2. `norm` must act before the dense layer only.
    Raises: as `unit_paper` and `norm`; ShapeError unless W_out has d columns.
    Precision: `norm`, `unit_paper`, one addition.
    Source: arXiv:2202.10447, with LayerNorm or ScaleNorm as `norm`.
    """
    x = check.real("gau.block_pre_norm", "x", x)
    weights = (w_in, b_in, gamma_q, beta_q, gamma_k, beta_k, w_out, b_out)
    arrays = (mask, bias, positions, frequencies, *weights)
    y = unit_paper(norm(x), *arrays, length=length, rotate=rotate, kernel=kernel)
    return _residual("gau.block_pre_norm", x, y)


def _self_parts(
    operation: str,
    x: np.ndarray,
    positions: np.ndarray | None,
    frequencies: np.ndarray | None,
    dense: tuple[np.ndarray, np.ndarray | None],
    query: tuple[np.ndarray, np.ndarray | None],
    key: tuple[np.ndarray, np.ndarray | None],
    rotate: Callable[..., np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    gamma_q = check.real(operation, "gamma_q", query[0])
    check.shape(operation, gamma_q.ndim == 1, "gamma_q (s,)", gamma_q=gamma_q)
    u, v, z = parts(x, *dense, key_width=gamma_q.shape[0])
    q, k = scale_offset(z, *query), scale_offset(z, *key)
    q = _rotated(operation, "positions", q, positions, frequencies, rotate)
    return u, v, q, _rotated(operation, "positions", k, positions, frequencies, rotate)


def _rotated(
    operation: str,
    name: str,
    x: np.ndarray,
    positions: np.ndarray | None,
    frequencies: np.ndarray | None,
    rotate: Callable[..., np.ndarray],
) -> np.ndarray:
    lacking = positions is not None and frequencies is None
    check.domain(operation, not lacking, f"frequencies for {name}", frequencies=frequencies)
    if positions is None or frequencies is None:
        return x
    return rotate(x, rope.angles(positions, frequencies))


def _products(operation: str, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    fits = min(q.ndim, k.ndim) >= 2 and q.shape[:-2] == k.shape[:-2] and q.shape[-1] == k.shape[-1]
    check.shape(operation, fits, "queries (*b, n, s) and keys (*b, m, s)", queries=q, keys=k)
    return np.einsum("...ns,...ms->...nm", q, k)


def _gated(
    operation: str,
    u: np.ndarray,
    v: np.ndarray,
    scores: np.ndarray,
    mask: np.ndarray | None,
    bias: np.ndarray | None,
    kernel: Callable[..., np.ndarray],
    w_out: np.ndarray,
    b_out: np.ndarray | None,
) -> np.ndarray:
    if bias is not None:
        bias = check.real(operation, "bias", bias)
        expected = "a bias that broadcasts to the scores (*b, n, m)"
        common = check.broadcast(operation, expected, scores=scores, bias=bias)
        check.shape(operation, common == scores.shape, expected, scores=scores, bias=bias)
        scores = scores + bias
    if mask is not None:
        mask = check.boolean(operation, "mask", mask)
        # A (b, m) mask would be read as (n, m); padding must come as (b, 1, m).
        fits = mask.ndim == scores.ndim or mask.shape == scores.shape[-2:]
        check.shape(operation, fits, "a mask (n, m) or one with every axis of the scores", scores=scores, mask=mask)
    return project(u * np.einsum("...nm,...me->...ne", kernel(scores, mask), v), w_out, b_out)


def _residual(operation: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = check.real(operation, "x", x)
    check.shape(operation, x.shape == y.shape, "a unit that ends in the width of x", x=x, unit=y)
    return x + y
