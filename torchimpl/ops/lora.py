"""Low-rank adaptation, as a parameterisation and as an update rule of the dense weight.

    W' = W + scale A B,    y = x W + scale (x A) B

Specification: refimpl/ops/lora.py. What acts on rows (apply and its two gradients) stays in the format of its input, as
autograd would leave it; what changes a weight is formed in float32 for 16-bit input and rounded once.
"""

import functools
import math
from numbers import Real
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from torchimpl import check

Number = int | float
# A whole shape carries the name, as in the specification, so that a misfit reaches the check of the operator.
DR = Float[Tensor, "*d_r"]
RE = Float[Tensor, "*r_e"]
DE = Float[Tensor, "*d_e"]
Array = Float[Tensor, "..."]


class Factors(NamedTuple):
    """The pair of factors, or of their gradients."""

    A: Tensor
    B: Tensor


class AdamW(NamedTuple):
    """One parameter array with the running means of its gradient (m) and of its square (v)."""

    parameter: Tensor
    m: Tensor
    v: Tensor


class AdamWFactors(NamedTuple):
    """Both factors with their optimiser states."""

    A: Tensor
    B: Tensor
    m_A: Tensor
    v_A: Tensor
    m_B: Tensor
    v_B: Tensor


class PeftWeights(NamedTuple):
    """A base weight and its factors in the orientation of torch.nn.Linear."""

    W_t: Tensor
    lora_A: Tensor
    lora_B: Tensor


class Weights(NamedTuple):
    """A base weight and its factors for row vectors."""

    W: Tensor
    A: Tensor
    B: Tensor


def scale_lora(*, alpha: Number, r: int) -> float:
    """The factor of the original paper: alpha / r.

    Raises: DomainError unless alpha is finite and r a positive integer.
    """
    return _number("lora.scale_lora", "alpha", alpha) / _count("lora.scale_lora", "r", r)


def scale_rslora(*, alpha: Number, r: int) -> float:
    """The rank-stabilised factor: alpha / sqrt(r).

    Raises: DomainError as scale_lora.
    """
    return _number("lora.scale_rslora", "alpha", alpha) / math.sqrt(_count("lora.scale_rslora", "r", r))


def delta(A: DR, B: RE, *, scale: Number) -> Float[Tensor, "d e"]:
    """The change that the factors make to the weight: scale A B.

    Raises: ShapeError where the r of A and B differ or r = 0; DomainError for a scale that is not finite.
    """
    _check_factors("lora.delta", A, B)
    wide = _number("lora.delta", "scale", scale) * (check.island(A) @ check.island(B))
    return wide.to(A.dtype)


def apply(x: Array, W: DE, A: DR, B: RE, *, scale: Number) -> Float[Tensor, "*b_n e"]:
    """The adapted projection of x (..., d): y = x W + scale (x A) B; A B is never formed, nor is its gradient.

    Raises: ShapeError, DomainError as delta. Dropout and bias are the caller's.
    """
    _check_factors("lora.apply", A, B, W=W)
    _check_rows("lora.apply", "x", x, "d", A.shape[0])
    return _adapted(x, W, A, B, _number("lora.apply", "scale", scale))


def merge(W: DE, A: DR, B: RE, *, scale: Number) -> Float[Tensor, "*d_e"]:
    """The dense weight that acts like the adapted one: W + scale A B, a new tensor.

    Raises: ShapeError, DomainError as delta.
    """
    _check_factors("lora.merge", A, B, W=W)
    return _moved(W, A, B, _number("lora.merge", "scale", scale))


def unmerge(W: DE, A: DR, B: RE, *, scale: Number) -> Float[Tensor, "*d_e"]:
    """The base weight recovered from a merged one: W - scale A B, a new tensor and not bit exact.

    Raises: ShapeError, DomainError as delta.
    """
    _check_factors("lora.unmerge", A, B, W=W)
    return _moved(W, A, B, -_number("lora.unmerge", "scale", scale))


def merge_symmetric(W: DE, A: DR, B: RE, A_0: Array, B_0: Array, *, scale: Number) -> Float[Tensor, "*d_e"]:
    """The dense weight when both factors start non-zero: W - scale A_0 B_0 + scale A B.

    Raises: ShapeError, DomainError as delta.
    """
    op = "lora.merge_symmetric"
    _check_factors(op, A, B, W=W)
    _check_factors(op, A_0, B_0, W=W)
    scale = _number(op, "scale", scale)
    start = _moved(check.island(W), A_0, B_0, -scale)
    return _moved(start, A, B, scale).to(W.dtype)


def gradients_dense(G: DE, A: DR, B: RE, *, scale: Number) -> Factors:
    """The gradients of the factors from the gradient of the dense weight: dA = scale G B^T, dB = scale A^T G.

    Raises: ShapeError, DomainError as delta.
    """
    op = "lora.gradients_dense"
    _check_factors(op, A, B, G=G)
    dA, dB = _gradients(G, A, B, _number(op, "scale", scale))
    return Factors(dA.to(G.dtype), dB.to(G.dtype))


def gradients_factored(x: Array, dy: Array, A: DR, B: RE, *, scale: Number) -> Factors:
    """The same gradients from the rows x (..., d) and dy (..., e): dA = scale x^T (dy B^T), dB = scale (x A)^T dy.

    Raises: ShapeError also where the leading axes of x and dy differ; DomainError as delta.
    """
    op = "lora.gradients_factored"
    _check_factors(op, A, B)
    _check_rows(op, "x", x, "d", A.shape[0])
    _check_rows(op, "dy", dy, "e", B.shape[1])
    check.shape(op, x.shape[:-1] == dy.shape[:-1], "x (..., d) and dy (..., e) with equal leading axes", x=x, dy=dy)
    scale, x, dy = _number(op, "scale", scale), _flat(x), _flat(dy)
    return Factors(scale * (x.T @ (dy @ B.T)), scale * ((x @ A).T @ dy))


def gradient_input(dy: Array, W: DE, A: DR, B: RE, *, scale: Number) -> Float[Tensor, "*b_n d"]:
    """The gradient of the input, from dy (..., e): dx = dy W^T + scale (dy B^T) A^T.

    Raises: ShapeError, DomainError as delta.
    """
    op = "lora.gradient_input"
    _check_factors(op, A, B, W=W)
    _check_rows(op, "dy", dy, "e", B.shape[1])
    return _adapted(dy, W.T, B.T, A.T, _number(op, "scale", scale))


def update(A: DR, B: RE, A_new: Array, B_new: Array, *, scale: Number) -> Float[Tensor, "d e"]:
    """What any step of the factors does to the weight: scale (A_new B_new - A B).

    Formed as scale ((A_new - A) B_new + A (B_new - B)), which a small step does not cancel.
    Raises: ShapeError, DomainError as delta.
    """
    op = "lora.update"
    _check_factors(op, A, B)
    _check_factors(op, A_new, B_new)
    same = A.shape == A_new.shape and B.shape == B_new.shape
    check.shape(op, same, "new factors of the shapes of the old", A=A, A_new=A_new, B=B, B_new=B_new)
    dtype = A.dtype
    A, B, A_new, B_new = check.island(A), check.island(B), check.island(A_new), check.island(B_new)
    return (_number(op, "scale", scale) * ((A_new - A) @ B_new + A @ (B_new - B))).to(dtype)


def sgd(A: DR, B: RE, G: DE, *, scale: Number, learning_rate: Number) -> Factors:
    """One step of gradient descent on both factors, as new tensors: A - learning_rate dA, B - learning_rate dB.

    Raises: ShapeError, DomainError as delta; DomainError for a negative learning_rate.
    """
    move_A, move_B = _sgd_moves("lora.sgd", A, B, G, scale, learning_rate)
    return Factors((check.island(A) + move_A).to(A.dtype), (check.island(B) + move_B).to(B.dtype))


def sgd_update(A: DR, B: RE, G: DE, *, scale: Number, learning_rate: Number) -> Float[Tensor, "*d_e"]:
    """What sgd does to the weight, exactly, first and second order.

    With a, b the moves of the factors: scale (a B + A b + a b).
    Raises: as sgd.
    """
    move_A, move_B = _sgd_moves("lora.sgd_update", A, B, G, scale, learning_rate)
    return (scale * (move_A @ (check.island(B) + move_B) + check.island(A) @ move_B)).to(A.dtype)


def sgd_frozen(A: DR, B: RE, G: DE, *, scale: Number, learning_rate: Number) -> Float[Tensor, "*r_e"]:
    """One step with A frozen, as the new B: B - learning_rate scale A^T G.

    Raises: as sgd.
    """
    op = "lora.sgd_frozen"
    _check_factors(op, A, B, G=G)
    rate = _number(op, "scale", scale) * _at_least_zero(op, "learning_rate", learning_rate)
    return _moved(B, A.T, G, -rate)


def sgd_frozen_update(A: DR, G: DE, *, scale: Number, learning_rate: Number) -> Float[Tensor, "*d_e"]:
    """What sgd_frozen does to the weight: -learning_rate scale^2 A (A^T G), a fixed projection of the gradient.

    Raises: ShapeError where A and G disagree in d or r = 0; DomainError as sgd.
    """
    op = "lora.sgd_frozen_update"
    check.real(op, "A", A)
    check.real(op, "G", G)
    fits = A.ndim == G.ndim == 2 and A.shape[0] == G.shape[0] and A.shape[1] >= 1
    check.shape(op, fits, "A (d, r) and G (d, e) with r >= 1", A=A, G=G)
    rate = _at_least_zero(op, "learning_rate", learning_rate) * _number(op, "scale", scale) ** 2
    wide = check.island(A)
    return (-rate * (wide @ (wide.T @ check.island(G)))).to(A.dtype)


def random_projection_update(G: DE, A: Array, B: Array, *, learning_rate: Number) -> Float[Tensor, "*d_e"]:
    """The update of W when fresh factors are drawn at every step: -(learning_rate / r) (A A^T G + G B^T B).

    Raises: as sgd.
    """
    op = "lora.random_projection_update"
    _check_factors(op, A, B, G=G)
    rate = _at_least_zero(op, "learning_rate", learning_rate) / A.shape[1]
    dA, dB = _gradients(G, A, B, 1.0)
    return (-rate * (check.island(A) @ dB + dA @ check.island(B))).to(G.dtype)


def adamw_array(
    parameter: Array,
    gradient: Array,
    m: Array,
    v: Array,
    *,
    step: int,
    learning_rate: Number,
    beta_1: Number,
    beta_2: Number,
    epsilon: Number,
    weight_decay: Number,
) -> AdamW:
    """One AdamW step of one array, as new tensors; `step` counts from 1 and includes this one.

    Each result has the format of the array that it replaces: keep m and v in float32 beside 16-bit parameters.
    Raises: ShapeError where the four shapes differ; DomainError for step < 1, a beta outside [0, 1), epsilon <= 0,
        negative learning_rate or weight_decay.
    """
    op = "lora.adamw_array"
    arrays = {"parameter": parameter, "gradient": gradient, "m": m, "v": v}
    for name, array in arrays.items():
        check.real(op, name, array)
    same = parameter.shape == gradient.shape == m.shape == v.shape
    check.shape(op, same, "four equal shapes", **arrays)
    step = _count(op, "step", step)
    rate, decay = _at_least_zero(op, "learning_rate", learning_rate), _at_least_zero(op, "weight_decay", weight_decay)
    beta_1, beta_2 = _number(op, "beta_1", beta_1), _number(op, "beta_2", beta_2)
    check.domain(op, 0 <= beta_1 < 1 and 0 <= beta_2 < 1, "beta_1 and beta_2 in [0, 1)", beta_1=beta_1, beta_2=beta_2)
    epsilon = _number(op, "epsilon", epsilon)
    check.domain(op, epsilon > 0, "epsilon > 0", epsilon=epsilon)
    p, g = check.island(parameter), check.island(gradient)
    mean = beta_1 * check.island(m) + (1 - beta_1) * g
    square = beta_2 * check.island(v) + (1 - beta_2) * (g * g)
    # Two choices: the root must not see a zero, where its slope is infinite.
    zero = square == 0
    root = (square.masked_fill(zero, 1) / (1 - beta_2**step)).sqrt().masked_fill(zero, 0)
    move = mean / (1 - beta_1**step) / (root + epsilon)
    new = p * (1 - rate * decay) - rate * move
    return AdamW(new.to(parameter.dtype), mean.to(m.dtype), square.to(v.dtype))


def adamw(
    A: DR,
    B: RE,
    G: DE,
    m_A: Array,
    v_A: Array,
    m_B: Array,
    v_B: Array,
    *,
    scale: Number,
    step: int,
    learning_rate: Number,
    beta_1: Number,
    beta_2: Number,
    epsilon: Number,
    weight_decay: Number,
) -> AdamWFactors:
    """One AdamW step of both factors: adamw_array on (A, dA) and on (B, dB), with gradients_dense at the old factors.

    Raises: as gradients_dense and adamw_array.
    """
    dA, dB = gradients_dense(G, A, B, scale=scale)
    rule = functools.partial(
        adamw_array,
        step=step,
        learning_rate=learning_rate,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=epsilon,
        weight_decay=weight_decay,
    )
    new_A, new_B = rule(A, dA, m_A, v_A), rule(B, dB, m_B, v_B)
    return AdamWFactors(new_A.parameter, new_B.parameter, new_A.m, new_A.v, new_B.m, new_B.v)


def additive_delta(A: DR, B: RE) -> Float[Tensor, "d e"]:
    """The additive change of the weight: A [I_r ... I_r] + [I_r ; ... ; I_r] B, that is A[i, j mod r] + B[i mod r, j].

    Raises: ShapeError unless r divides d and e; otherwise as delta.
    """
    _check_factors("lora.additive_delta", A, B)
    (d, r), e = A.shape, B.shape[1]
    check.shape("lora.additive_delta", d % r == e % r == 0, "A (d, r), B (r, e), r dividing d and e", A=A, B=B)
    return A.repeat(1, e // r) + B.repeat(d // r, 1)


def additive_gradients(G: DE, *, r: int) -> Factors:
    """The gradients of the additive factors: G [I_r ... I_r]^T and [I_r ; ... ; I_r]^T G, sums over equal residues.

    Raises: ShapeError unless r divides both axes of G; DomainError for r < 1.
    """
    dA, dB = _additive_gradients("lora.additive_gradients", G, r)
    return Factors(dA.to(G.dtype), dB.to(G.dtype))


def additive_update(G: DE, *, r: int, learning_rate: Number) -> Float[Tensor, "*d_e"]:
    """What a step of gradient descent on the additive factors does to the weight: exact, no second order.

    Raises: as additive_gradients; DomainError for a negative learning_rate.
    """
    rate = _at_least_zero("lora.additive_update", "learning_rate", learning_rate)
    return (-rate * additive_delta(*_additive_gradients("lora.additive_update", G, r))).to(G.dtype)


def from_peft(W_t: Array, lora_A: Array, lora_B: Array) -> Weights:
    """The transposes (W_t^T, lora_A^T, lora_B^T), copied: W_t (e, d), lora_A (r, d), lora_B (e, r) to W, A, B.

    Raises: ShapeError, DomainError as delta.
    """
    op = "lora.from_peft"
    for name, array in (("W_t", W_t), ("lora_A", lora_A), ("lora_B", lora_B)):
        check.real(op, name, array)
    fits = W_t.ndim == lora_A.ndim == lora_B.ndim == 2 and lora_A.shape[0] == lora_B.shape[1] >= 1
    fits = fits and W_t.shape == (lora_B.shape[0], lora_A.shape[1])
    check.shape(op, fits, "W_t (e, d), lora_A (r, d), lora_B (e, r), r >= 1", W_t=W_t, lora_A=lora_A, lora_B=lora_B)
    return Weights(_transposed(W_t), _transposed(lora_A), _transposed(lora_B))


def to_peft(W: DE, A: DR, B: RE) -> PeftWeights:
    """The transposes (W^T, A^T, B^T), copied: W_t (e, d), lora_A (r, d), lora_B (e, r).

    Raises: ShapeError, DomainError as delta.
    """
    _check_factors("lora.to_peft", A, B, W=W)
    return PeftWeights(_transposed(W), _transposed(A), _transposed(B))


def _adapted(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x W + scale (x A) B, the second product added to the first by one kernel."""
    rows = _flat(x)
    return torch.addmm(rows @ W, rows @ A, B, alpha=scale).reshape(*x.shape[:-1], W.shape[1])


def _moved(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale A B, rounded once."""
    return torch.addmm(check.island(W), check.island(A), check.island(B), alpha=scale).to(W.dtype)


def _gradients(G: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """scale G B^T and scale A^T G, in float32 where they have 16 bits."""
    G = check.island(G)
    return scale * (G @ check.island(B).T), scale * (check.island(A).T @ G)


def _sgd_moves(op: str, A: Tensor, B: Tensor, G: Tensor, scale: Number, learning_rate: Number) -> tuple[Tensor, Tensor]:
    _check_factors(op, A, B, G=G)
    rate = _number(op, "scale", scale) * _at_least_zero(op, "learning_rate", learning_rate)
    return _gradients(G, A, B, -rate)


def _additive_gradients(op: str, G: Tensor, r: int) -> tuple[Tensor, Tensor]:
    check.real(op, "G", G)
    r = _count(op, "r", r)
    # Dynamo puts no number into a text that it takes for open.
    if not (G.ndim == 2 and G.shape[0] % r == G.shape[1] % r == 0):
        check.shape(op, False, f"G (d, e), r={r} dividing d and e", G=G)
    (d, e), G = G.shape, check.island(G)
    return G.reshape(d, e // r, r).sum(dim=1), G.reshape(d // r, r, e).sum(dim=0)


def _transposed(x: Tensor) -> Tensor:
    # contiguous() alone would return x itself where one of its axes has length 1.
    return x.T.clone(memory_format=torch.contiguous_format)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _number(op: str, name: str, value: object) -> float:
    finite = isinstance(value, Real) and -math.inf < float(value) < math.inf
    check.domain(op, finite, f"{name} a finite number", **{name: value})
    return float(value)  # type: ignore[arg-type]


def _at_least_zero(op: str, name: str, value: object) -> float:
    number = _number(op, name, value)
    check.domain(op, number >= 0, f"{name} >= 0", **{name: value})
    return number


def _count(op: str, name: str, value: object) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    check.domain(op, whole, f"{name} an integer >= 1", **{name: value})
    return value  # type: ignore[return-value]


def _check_rows(op: str, name: str, rows: Tensor, letter: str, width: int) -> None:
    check.real(op, name, rows)
    fits = rows.ndim >= 1 and rows.shape[-1] == width
    check.shape(op, fits, f"{name} (..., {letter}) with {letter}={width}", **{name: rows})


def _check_factors(op: str, A: Tensor, B: Tensor, **dense: Tensor) -> None:
    """A (d, r), B (r, e) and the arrays of shape (d, e), checked against each other."""
    for name, array in (("A", A), ("B", B), *dense.items()):
        check.real(op, name, array)
    fits = A.ndim == B.ndim == 2 and A.shape[1] == B.shape[0] >= 1
    fits = fits and all(array.shape == (A.shape[0], B.shape[1]) for array in dense.values())
    expected = "A (d, r), B (r, e)" + "".join(f", {name} (d, e)" for name in dense) + " with r >= 1"
    check.shape(op, fits, expected, A=A, B=B, **dense)
