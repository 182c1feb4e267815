"""Low-rank adaptation as graphs: the adapted layer, its gradients, and the update rules of the factors.

    W' = W + scale A B,    y = x W + scale (x A) B

The factors are inputs like any other value, of open rank: one graph takes adapters of every r. Numbers (scale,
learning_rate, step ...) are Python numbers and stand in the graph as constants. Values are not checked.
Specification: refimpl/ops/lora.py.
"""

import functools
import math
from numbers import Real
from typing import NamedTuple

import numpy as np

from export import check
from export.graph import Dim, Size, Value, agree, arange, function, sqrt, take
from export.special import scaled

Number = int | float


class Factors(NamedTuple):
    """The pair of factors, or of their gradients."""

    A: Value
    B: Value


class AdamW(NamedTuple):
    """One parameter array with the running means of its gradient (m) and of its square (v)."""

    parameter: Value
    m: Value
    v: Value


class AdamWFactors(NamedTuple):
    """Both factors with their optimiser states."""

    A: Value
    B: Value
    m_A: Value
    v_A: Value
    m_B: Value
    v_B: Value


class PeftWeights(NamedTuple):
    """A base weight and its factors in the orientation of torch.nn.Linear."""

    W_t: Value
    lora_A: Value
    lora_B: Value


class Weights(NamedTuple):
    """A base weight and its factors for row vectors."""

    W: Value
    A: Value
    B: Value


def scale_lora(*, alpha: Number, r: int) -> float:
    """alpha / r, computed while the graph is written. Raises: DomainError unless alpha is finite and r >= 1."""
    return _number("lora.scale_lora", "alpha", alpha) / _count("lora.scale_lora", "r", r)


def scale_rslora(*, alpha: Number, r: int) -> float:
    """alpha / sqrt(r), computed while the graph is written. Raises: DomainError as scale_lora."""
    return _number("lora.scale_rslora", "alpha", alpha) / math.sqrt(_count("lora.scale_rslora", "r", r))


@function
def delta(A: Value, B: Value, *, scale: Number) -> Value:
    """scale A B, (d, e). Raises: ShapeError where A and B do not fit; DomainError for a scale that is not finite."""
    _factors("lora.delta", A, B)
    return _product(A, B, _number("lora.delta", "scale", scale))


@function
def apply(x: Value, W: Value, A: Value, B: Value, *, scale: Number) -> Value:
    """x W + scale (x A) B for x (..., d); A B is never formed. Raises: ShapeError, DomainError as delta."""
    op = "lora.apply"
    _factors(op, A, B, W=W)
    _rows(op, "x", x, "d", A.shape[0])
    return _adapted(x, W, A, B, _number(op, "scale", scale))


@function
def merge(W: Value, A: Value, B: Value, *, scale: Number) -> Value:
    """W + scale A B. Raises: ShapeError, DomainError as delta."""
    _factors("lora.merge", A, B, W=W)
    return W + _product(A, B, _number("lora.merge", "scale", scale))


@function
def unmerge(W: Value, A: Value, B: Value, *, scale: Number) -> Value:
    """W - scale A B; the bits that merge rounded away stay lost. Raises: ShapeError, DomainError as delta."""
    _factors("lora.unmerge", A, B, W=W)
    return W - _product(A, B, _number("lora.unmerge", "scale", scale))


@function
def merge_symmetric(W: Value, A: Value, B: Value, A_0: Value, B_0: Value, *, scale: Number) -> Value:
    """W - scale A_0 B_0 + scale A B; the ranks of the pairs may differ. Raises: ShapeError, DomainError as delta."""
    op = "lora.merge_symmetric"
    _factors(op, A, B, W=W)
    _factors(op, A_0, B_0, W=W)
    scale = _number(op, "scale", scale)
    return W - _product(A_0, B_0, scale) + _product(A, B, scale)


@function
def gradients_dense(G: Value, A: Value, B: Value, *, scale: Number) -> Factors:
    """dA = scale G B^T and dB = scale A^T G. Raises: ShapeError, DomainError as delta."""
    op = "lora.gradients_dense"
    _factors(op, A, B, G=G)
    scale = _number(op, "scale", scale)
    return Factors(_product(G, _t(B), scale), _product(_t(A), G, scale))


@function
def gradients_factored(x: Value, dy: Value, A: Value, B: Value, *, scale: Number) -> Factors:
    """dA = scale x^T (dy B^T) and dB = scale (x A)^T dy, leading axes summed; G is never formed.

    Raises: ShapeError also where the leading axes of x and dy differ; DomainError as delta.
    """
    op = "lora.gradients_factored"
    _factors(op, A, B)
    _rows(op, "x", x, "d", A.shape[0])
    _rows(op, "dy", dy, "e", B.shape[1])
    same = x.ndim == dy.ndim and all(map(agree, x.shape[:-1], dy.shape[:-1]))
    check.shape(op, same, "x (..., d) and dy (..., e) with equal leading axes", x=x, dy=dy)
    x, dy = x.reshape(-1, x.size(-1)), dy.reshape(-1, dy.size(-1))
    scale = _number(op, "scale", scale)
    return Factors(_product(_t(x), dy @ _t(B), scale), _product(_t(x @ A), dy, scale))


@function
def gradient_input(dy: Value, W: Value, A: Value, B: Value, *, scale: Number) -> Value:
    """dy W^T + scale (dy B^T) A^T for dy (..., e). Raises: ShapeError, DomainError as delta."""
    op = "lora.gradient_input"
    _factors(op, A, B, W=W)
    _rows(op, "dy", dy, "e", B.shape[1])
    return _adapted(dy, _t(W), _t(B), _t(A), _number(op, "scale", scale))


@function
def update(A: Value, B: Value, A_new: Value, B_new: Value, *, scale: Number) -> Value:
    """scale (A_new B_new - A B): the products cancel, accumulate W in a wide format.

    Raises: ShapeError, DomainError as delta.
    """
    op = "lora.update"
    _factors(op, A, B)
    _factors(op, A_new, B_new)
    same = all(map(agree, (*A.shape, *B.shape), (*A_new.shape, *B_new.shape)))
    check.shape(op, same, "new factors of the shapes of the old", A=A, A_new=A_new, B=B, B_new=B_new)
    return scaled(A_new @ B_new - A @ B, _number(op, "scale", scale))


@function
def sgd(A: Value, B: Value, G: Value, *, scale: Number, learning_rate: Number) -> Factors:
    """A - learning_rate dA and B - learning_rate dB, both from the old factors.

    Raises: ShapeError, DomainError as delta; DomainError for a negative learning_rate.
    """
    op = "lora.sgd"
    _factors(op, A, B, G=G)
    rate = _number(op, "scale", scale) * _at_least_zero(op, "learning_rate", learning_rate)
    return Factors(A - _product(G, _t(B), rate), B - _product(_t(A), G, rate))


@function
def sgd_update(A: Value, B: Value, G: Value, *, scale: Number, learning_rate: Number) -> Value:
    """What sgd does to the weight, both orders:

        -learning_rate scale^2 (G B^T B + A A^T G) + learning_rate^2 scale^3 G B^T A^T G

    Raises: as sgd.
    """
    op = "lora.sgd_update"
    _factors(op, A, B, G=G)
    scale, rate = _number(op, "scale", scale), _at_least_zero(op, "learning_rate", learning_rate)
    GB, AG = G @ _t(B), _t(A) @ G
    return _product(GB, AG, rate**2 * scale**3) - scaled(GB @ B + A @ AG, rate * scale**2)


@function
def sgd_frozen(A: Value, B: Value, G: Value, *, scale: Number, learning_rate: Number) -> Value:
    """The new B where A is frozen: B - learning_rate scale A^T G. Raises: as sgd."""
    op = "lora.sgd_frozen"
    _factors(op, A, B, G=G)
    rate = _number(op, "scale", scale) * _at_least_zero(op, "learning_rate", learning_rate)
    return B - _product(_t(A), G, rate)


@function
def sgd_frozen_update(A: Value, G: Value, *, scale: Number, learning_rate: Number) -> Value:
    """What sgd_frozen does to the weight: -learning_rate scale^2 A (A^T G).

    Raises: ShapeError where A and G disagree in d; DomainError as sgd.
    """
    op = "lora.sgd_frozen_update"
    ok = A.ndim == G.ndim == 2 and agree(A.shape[0], G.shape[0]) and not _empty(A.shape[1])
    check.shape(op, ok, "A (d, r) and G (d, e) with r >= 1", A=A, G=G)
    rate = _at_least_zero(op, "learning_rate", learning_rate)
    return _product(A, _t(A) @ G, -rate * _number(op, "scale", scale) ** 2)


@function
def random_projection_update(G: Value, A: Value, B: Value, *, learning_rate: Number) -> Value:
    """-(learning_rate / r) (A A^T G + G B^T B), the factors drawn by the caller. Raises: as sgd."""
    op = "lora.random_projection_update"
    _factors(op, A, B, G=G)
    both = A @ (_t(A) @ G) + (G @ _t(B)) @ B
    return scaled(both / A.size(1).cast(A.dtype), -_at_least_zero(op, "learning_rate", learning_rate))


@function
def adamw_array(
    parameter: Value,
    gradient: Value,
    m: Value,
    v: Value,
    *,
    step: int,
    learning_rate: Number,
    beta_1: Number,
    beta_2: Number,
    epsilon: Number,
    weight_decay: Number,
) -> AdamW:
    """One AdamW step of one array; `step` counts from 1 and is part of the graph, as the other numbers are.

    The corrections 1 - beta^step are formed in float64 while the graph is written.
    Raises: ShapeError where the four shapes differ; DomainError for step < 1, a beta outside [0, 1), epsilon <= 0,
    negative learning_rate or weight_decay.
    """
    op = "lora.adamw_array"
    arrays = {"parameter": parameter, "gradient": gradient, "m": m, "v": v}
    same = len({a.ndim for a in arrays.values()}) == 1
    same = same and all(map(agree, *(a.shape for a in arrays.values())))
    check.shape(op, same, "four equal shapes", **arrays)
    step = _count(op, "step", step)
    rate, decay = _at_least_zero(op, "learning_rate", learning_rate), _at_least_zero(op, "weight_decay", weight_decay)
    beta_1, beta_2 = _number(op, "beta_1", beta_1), _number(op, "beta_2", beta_2)
    check.domain(op, 0 <= beta_1 < 1 and 0 <= beta_2 < 1, "beta_1 and beta_2 in [0, 1)", beta_1=beta_1, beta_2=beta_2)
    epsilon = _number(op, "epsilon", epsilon)
    check.domain(op, epsilon > 0, "epsilon > 0", epsilon=epsilon)
    m = m * beta_1 + gradient * (1 - beta_1)
    v = v * beta_2 + (gradient * gradient) * (1 - beta_2)
    move = (m / (1 - beta_1**step)) / (sqrt(v / (1 - beta_2**step)) + epsilon)
    return AdamW(parameter * (1 - rate * decay) - move * rate, m, v)


@function
def adamw(
    A: Value,
    B: Value,
    G: Value,
    m_A: Value,
    v_A: Value,
    m_B: Value,
    v_B: Value,
    *,
    scale: Number,
    step: int,
    learning_rate: Number,
    beta_1: Number,
    beta_2: Number,
    epsilon: Number,
    weight_decay: Number,
) -> AdamWFactors:
    """adamw_array on (A, dA) and on (B, dB), with gradients_dense at the old factors. Raises: as these."""
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


@function
def additive_delta(A: Value, B: Value) -> Value:
    """A[i, j mod r] + B[i mod r, j]. Raises: ShapeError unless r divides d and e; otherwise as delta."""
    op = "lora.additive_delta"
    _factors(op, A, B)
    r = A.shape[1]
    ok = _divides(r, A.shape[0]) and _divides(r, B.shape[1])
    check.shape(op, ok, "A (d, r), B (r, e), r dividing d and e", A=A, B=B)
    columns, rows = arange(B.size(1)) % A.size(1), arange(A.size(0)) % A.size(1)
    return take(A, columns, axis=1) + take(B, rows, axis=0)


@function
def additive_gradients(G: Value, *, r: int) -> Factors:
    """The sums of G over equal residues mod r: of columns (d, r), and of rows (r, e).

    Raises: ShapeError unless r divides both axes of G; DomainError for r < 1.
    """
    op = "lora.additive_gradients"
    r = _count(op, "r", r)
    ok = G.ndim == 2 and _divides(r, G.shape[0]) and _divides(r, G.shape[1])
    check.shape(op, ok, f"G (d, e), r={r} dividing d and e", G=G)
    return Factors(G.reshape(G.size(0), -1, r).sum(1), G.reshape(-1, r, G.size(1)).sum(0))


@function
def additive_update(G: Value, *, r: int, learning_rate: Number) -> Value:
    """-learning_rate additive_delta(*additive_gradients(G)).

    Raises: as additive_gradients; DomainError for a negative learning_rate.
    """
    rate = _at_least_zero("lora.additive_update", "learning_rate", learning_rate)
    return scaled(additive_delta(*additive_gradients(G, r=r)), -rate)


@function
def from_peft(W_t: Value, lora_A: Value, lora_B: Value) -> Weights:
    """The transposes: W_t (e, d), lora_A (r, d), lora_B (e, r) to W, A, B. Raises: ShapeError as delta."""
    ok = W_t.ndim == lora_A.ndim == lora_B.ndim == 2 and agree(lora_A.shape[0], lora_B.shape[1])
    ok = ok and not _empty(lora_A.shape[0])
    ok = ok and agree(lora_A.shape[1], W_t.shape[1]) and agree(lora_B.shape[0], W_t.shape[0])
    expected = "W_t (e, d), lora_A (r, d), lora_B (e, r), r >= 1"
    check.shape("lora.from_peft", ok, expected, W_t=W_t, lora_A=lora_A, lora_B=lora_B)
    return Weights(_t(W_t), _t(lora_A), _t(lora_B))


@function
def to_peft(W: Value, A: Value, B: Value) -> PeftWeights:
    """The transposes: W_t (e, d), lora_A (r, d), lora_B (e, r). Raises: ShapeError as delta."""
    _factors("lora.to_peft", A, B, W=W)
    return PeftWeights(_t(W), _t(A), _t(B))


def _t(x: Value) -> Value:
    return x.swap(0, 1)


def _product(A: Value, B: Value, scale: float) -> Value:
    return scaled(A @ B, scale)


def _adapted(x: Value, W: Value, A: Value, B: Value, scale: float) -> Value:
    # A row vector alone becomes one row.
    rows = x[None] if x.ndim == 1 else x
    y = rows @ W + _product(rows @ A, B, scale)
    return y[0] if x.ndim == 1 else y


def _number(op: str, name: str, value: object) -> float:
    check.domain(op, isinstance(value, Real) and math.isfinite(value), f"{name} a finite number", **{name: value})
    return float(value)  # type: ignore[arg-type]


def _at_least_zero(op: str, name: str, value: object) -> float:
    number = _number(op, name, value)
    check.domain(op, number >= 0, f"{name} >= 0", **{name: value})
    return number


def _count(op: str, name: str, value: object) -> int:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    check.domain(op, whole and bool(value >= 1), f"{name} an integer >= 1", **{name: value})  # type: ignore[operator]
    return int(value)  # type: ignore[call-overload]


def _empty(size: Size) -> bool:
    return size is not None and agree(size, 0)


def _divides(r: Size, size: Size) -> bool:
    """As far as the sizes are known."""
    if r is None or size is None:
        return True
    return agree((size if isinstance(size, Dim) else Dim(size)) % r, 0)


def _rows(op: str, name: str, x: Value, letter: str, width: Size) -> None:
    ok = check.real(op, name, x).ndim >= 1 and agree(x.shape[-1], width)
    check.shape(op, ok, f"{name} (..., {letter}) with {letter} as in the factors", **{name: x})


def _factors(op: str, A: Value, B: Value, **dense: Value) -> None:
    """A (d, r), B (r, e) and the values of shape (d, e) must fit each other; their sizes stay open."""
    for name, value in {"A": A, "B": B, **dense}.items():
        check.real(op, name, value)
    ok = A.ndim == B.ndim == 2 and agree(A.shape[1], B.shape[0]) and not _empty(A.shape[1])
    ok = ok and all(
        w.ndim == 2 and agree(w.shape[0], A.shape[0]) and agree(w.shape[1], B.shape[1]) for w in dense.values()
    )
    expected = "A (d, r), B (r, e)" + "".join(f", {name} (d, e)" for name in dense) + " with r >= 1"
    check.shape(op, ok, expected, A=A, B=B, **dense)
