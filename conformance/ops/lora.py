"""Judging lora: the adapted layer, its gradients, and the update rules of the factors as updates of the weight.

    W' = W + scale A B

The references contract everything at once, so that a bound covers low-rank, merged and split orders alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from itertools import count
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.budget import (
    Arithmetic,
    Ball,
    Profile,
    begun,
    einsum,
    gamma,
    half_subnormal,
    power,
    round_to,
    sqrt,
    stack,
    unit_roundoff,
)
from conformance.case import Case, Function, Operator, as_tuple, storage_arguments
from conformance.generate import Draw, drawn
from conformance.law import Law, LawFailed, Output, close, equal, run
from conformance.mutant import Mutant
from refimpl.ops import lora


# References. Letters: n rows, d inputs, e outputs, r rank.
def _scalar(a: Arithmetic, value: float) -> Ball:
    """A number, held in the working precision, or in the storage format where every operation rounds to it."""
    profile = a.profile
    held = "float64" if profile.dtype == "float64" else "float32"
    if profile.name == "eager" and profile.sixteen_bit:
        held = profile.dtype
    if round_to(np.asarray(value), held) == value:
        return a.exact(value)
    return a.ball(value, unit_roundoff(held) * abs(value) + half_subnormal(held))


def _widest(*balls: Ball) -> Ball:
    """The same number by several permitted ways: the largest radius."""
    return balls[0].arithmetic.ball(balls[0].mid, reduce(np.maximum, [b.rad for b in balls]))


def _sum(*terms: Ball) -> Ball:
    """A sum in any order."""
    return stack(terms).sum(0)


def scale_lora(a: Arithmetic, alpha: float, r: int) -> Ball:
    return _scalar(a, alpha) / float(r)


def scale_rslora(a: Arithmetic, alpha: float, r: int) -> Ball:
    return _scalar(a, alpha) / sqrt(a.exact(float(r)))


def delta(a: Arithmetic, A: Ball, B: Ball, scale: float) -> Ball:
    # Serving engines fold the scale into a stored B; layers store the product.
    return einsum("dr,re->de", A, (B * _scalar(a, scale)).stored()).stored()


def apply(a: Arithmetic, x: Ball, W: Ball, A: Ball, B: Ball, scale: float) -> Ball:
    length = A.shape[0] + A.shape[1] + 4
    B = (B * _scalar(a, scale)).stored()
    merged = einsum("...d,dr,re->...e", x, A, B, length=length)
    low = einsum("...r,re->...e", einsum("...d,dr->...r", x, A).stored(), B)
    return einsum("...d,de->...e", x, W, length=length) + _widest(merged, low).stored()


def merge(a: Arithmetic, W: Ball, A: Ball, B: Ball, scale: float) -> Ball:
    return begun(W, delta(a, A, B, scale), A.shape[1] + 1)


def unmerge(a: Arithmetic, W: Ball, A: Ball, B: Ball, scale: float) -> Ball:
    return begun(W, -delta(a, A, B, scale), A.shape[1] + 1)


def merge_symmetric(a: Arithmetic, W: Ball, A: Ball, B: Ball, A_0: Ball, B_0: Ball, scale: float) -> Ball:
    start = delta(a, A_0, B_0, scale)
    # The folded start W - scale A_0 B_0 is what a layer keeps.
    return _widest(_sum(W, -start, delta(a, A, B, scale)), (W - start).stored() + delta(a, A, B, scale))


def gradients_dense(a: Arithmetic, G: Ball, A: Ball, B: Ball, scale: float) -> tuple[Ball, Ball]:
    s = _scalar(a, scale)
    return einsum("de,re->dr", G, B).stored() * s, einsum("dr,de->re", A, G).stored() * s


def gradients_factored(a: Arithmetic, x: Ball, dy: Ball, A: Ball, B: Ball, scale: float) -> tuple[Ball, Ball]:
    d, e = A.shape[0], B.shape[1]
    n = int(np.prod(x.shape[:-1]))
    x, dy, s = x.reshape(n, d), dy.reshape(n, e), _scalar(a, scale)
    B, scaled = (B * s).stored(), (dy * s).stored()
    dense_A = einsum("nd,ne,re->dr", x, dy, B, length=n + e + 4)
    dense_B = einsum("nd,dr,ne->re", x, A, scaled, length=n + d + 4)
    low_A = einsum("nd,nr->dr", x, einsum("ne,re->nr", dy, B).stored())
    low_B = einsum("nr,ne->re", einsum("nd,dr->nr", x, A).stored(), scaled)
    return _widest(dense_A, low_A), _widest(dense_B, low_B)


def gradient_input(a: Arithmetic, dy: Ball, W: Ball, A: Ball, B: Ball, scale: float) -> Ball:
    return apply(a, dy, W.swapaxes(0, 1), B.swapaxes(0, 1), A.swapaxes(0, 1), scale)


def update(a: Arithmetic, A: Ball, B: Ball, A_new: Ball, B_new: Ball, scale: float) -> Ball:
    s = _scalar(a, scale)
    products = einsum("dr,re->de", A_new, B_new).stored() - einsum("dr,re->de", A, B).stored()
    moves = einsum("dr,re->de", A_new - A, B_new) + einsum("dr,re->de", A, B_new - B)
    return _widest(products * s, moves * s)


def sgd(a: Arithmetic, A: Ball, B: Ball, G: Ball, scale: float, learning_rate: float) -> tuple[Ball, Ball]:
    dA, dB = gradients_dense(a, G, A, B, scale)
    rate = _scalar(a, learning_rate)
    return A - dA.stored() * rate, B - dB.stored() * rate


def sgd_update(a: Arithmetic, A: Ball, B: Ball, G: Ball, scale: float, learning_rate: float) -> Ball:
    (d, r), e = A.shape, B.shape[1]
    s, rate = _scalar(a, scale), _scalar(a, learning_rate)
    GB, AG = einsum("de,re->dr", G, B).stored(), einsum("dr,de->re", A, G).stored()
    left = _widest(einsum("de,re,rf->df", G, B, B), einsum("dr,re->de", GB, B))
    right = _widest(einsum("dr,cr,ce->de", A, A, G), einsum("dr,re->de", A, AG))
    second = _widest(einsum("de,re,cr,cf->df", G, B, A, G), einsum("dr,re->de", GB, AG))
    y = second * (rate * rate * s * s * s) - (left + right) * (rate * s * s)
    # Whoever takes the difference of the two products rounds both.
    step = abs(scale * learning_rate)
    new_A = np.abs(A.value) + step * np.abs(G.value) @ np.abs(B.value).T
    new_B = np.abs(B.value) + step * np.abs(A.value).T @ np.abs(G.value)
    products = abs(scale) * (new_A @ new_B + np.abs(A.value) @ np.abs(B.value))
    return a.ball(y.mid, y.rad + gamma(d + e + r + 6, a.unit) * products)


def sgd_frozen(a: Arithmetic, A: Ball, B: Ball, G: Ball, scale: float, learning_rate: float) -> Ball:
    return sgd(a, A, B, G, scale, learning_rate)[1]


def sgd_frozen_update(a: Arithmetic, A: Ball, G: Ball, scale: float, learning_rate: float) -> Ball:
    s, AG = _scalar(a, scale), einsum("dr,de->re", A, G).stored()
    both = _widest(einsum("dr,cr,ce->de", A, A, G), einsum("dr,re->de", A, AG))
    return -(both * (_scalar(a, learning_rate) * s * s))


def random_projection_update(a: Arithmetic, G: Ball, A: Ball, B: Ball, learning_rate: float) -> Ball:
    GB, AG = einsum("de,re->dr", G, B).stored(), einsum("dr,de->re", A, G).stored()
    left = _widest(einsum("de,re,rf->df", G, B, B), einsum("dr,re->de", GB, B))
    right = _widest(einsum("dr,cr,ce->de", A, A, G), einsum("dr,re->de", A, AG))
    return -((left + right) * (_scalar(a, learning_rate) / float(A.shape[1])))


def _numbers(a: Arithmetic) -> Arithmetic:
    """Optimisers keep their numbers in the working precision, never in 16 bits."""
    return Arithmetic(Profile("float64" if a.profile.dtype == "float64" else "float32"), a.digits)


def adamw_array(
    a: Arithmetic, parameter: Ball, gradient: Ball, m: Ball, v: Ball, step: int, learning_rate: float,
    beta_1: float, beta_2: float, epsilon: float, weight_decay: float,
) -> tuple[Ball, Ball, Ball]:  # fmt: skip
    w = _numbers(a)

    def held(number: Ball) -> Ball:
        return a.ball(number.mid, number.rad)

    rate, one, two = (_scalar(w, value) for value in (learning_rate, beta_1, beta_2))
    m = m * held(one) + gradient * held(1.0 - one)
    v = v * held(two) + (gradient * gradient) * held(1.0 - two)
    mean = m.stored() / held(1.0 - power(one, float(step)))
    root = sqrt(v.stored() / held(1.0 - power(two, float(step))))
    # The same factors in other groups, as the root of each correction apart: four roundings more.
    move = mean / (root + held(_scalar(w, epsilon))) * a.ball(1.0, 4 * a.unit)
    kept = parameter * held(1.0 - rate * _scalar(w, weight_decay))
    return kept - move * held(rate), m, v


def adamw(
    a: Arithmetic, A: Ball, B: Ball, G: Ball, m_A: Ball, v_A: Ball, m_B: Ball, v_B: Ball, scale: float, **rule: Any
) -> tuple[Ball, ...]:  # fmt: skip
    dA, dB = gradients_dense(a, G, A, B, scale)
    A, m_A, v_A = adamw_array(a, A, dA.stored(), m_A, v_A, **rule)
    B, m_B, v_B = adamw_array(a, B, dB.stored(), m_B, v_B, **rule)
    return A, B, m_A, v_A, m_B, v_B


def additive_delta(a: Arithmetic, A: Ball, B: Ball) -> Ball:
    (d, r), e = A.shape, B.shape[1]
    return A[:, [j % r for j in range(e)]] + B[[i % r for i in range(d)], :]


def additive_gradients(a: Arithmetic, G: Ball, r: int) -> tuple[Ball, Ball]:
    d, e = G.shape
    dA = stack([G[:, k::r].sum(1) for k in range(r)], axis=1)
    return dA, stack([G[k::r, :].sum(0) for k in range(r)])


def additive_update(a: Arithmetic, G: Ball, r: int, learning_rate: float) -> Ball:
    dA, dB = additive_gradients(a, G, r)
    return -(additive_delta(a, dA.stored(), dB.stored()) * _scalar(a, learning_rate))


def from_peft(a: Arithmetic, W_t: Ball, lora_A: Ball, lora_B: Ball) -> tuple[Ball, ...]:
    return W_t.transpose(1, 0), lora_A.transpose(1, 0), lora_B.transpose(1, 0)


def to_peft(a: Arithmetic, W: Ball, A: Ball, B: Ball) -> tuple[Ball, ...]:
    return W.transpose(1, 0), A.transpose(1, 0), B.transpose(1, 0)


_STATES = ("A", "B", "m_A", "v_A", "m_B", "v_B")

OPERATORS = (
    Operator("lora.scale_lora", lora.scale_lora, scale_lora, ("scale",)),
    Operator("lora.scale_rslora", lora.scale_rslora, scale_rslora, ("scale",)),
    Operator("lora.delta", lora.delta, delta, multilinear=True),
    Operator("lora.apply", lora.apply, apply, multilinear=True),
    Operator("lora.merge", lora.merge, merge, ("W",), multilinear=True),
    Operator("lora.unmerge", lora.unmerge, unmerge, ("W",), multilinear=True),
    Operator("lora.merge_symmetric", lora.merge_symmetric, merge_symmetric, ("W",), multilinear=True),
    Operator("lora.gradients_dense", lora.gradients_dense, gradients_dense, ("dA", "dB"), multilinear=True),
    Operator("lora.gradients_factored", lora.gradients_factored, gradients_factored, ("dA", "dB"), multilinear=True),
    Operator("lora.gradient_input", lora.gradient_input, gradient_input, ("dx",), multilinear=True),
    Operator("lora.update", lora.update, update, ("dW",), multilinear=True),
    Operator("lora.sgd", lora.sgd, sgd, ("A", "B"), multilinear=True),
    Operator("lora.sgd_update", lora.sgd_update, sgd_update, ("dW",), multilinear=True),
    Operator("lora.sgd_frozen", lora.sgd_frozen, sgd_frozen, ("B",), multilinear=True),
    Operator("lora.sgd_frozen_update", lora.sgd_frozen_update, sgd_frozen_update, ("dW",), multilinear=True),
    Operator(
        "lora.random_projection_update", lora.random_projection_update, random_projection_update, ("dW",),
        multilinear=True,
    ),
    Operator("lora.adamw_array", lora.adamw_array, adamw_array, ("parameter", "m", "v")),
    Operator("lora.adamw", lora.adamw, adamw, _STATES),
    Operator("lora.additive_delta", lora.additive_delta, additive_delta, multilinear=True),
    Operator("lora.additive_gradients", lora.additive_gradients, additive_gradients, ("dA", "dB"), multilinear=True),
    Operator("lora.additive_update", lora.additive_update, additive_update, ("dW",), multilinear=True),
    Operator("lora.from_peft", lora.from_peft, from_peft, ("W", "A", "B"), multilinear=True),
    Operator("lora.to_peft", lora.to_peft, to_peft, ("W_t", "lora_A", "lora_B"), multilinear=True),
)  # fmt: skip
_CALLS = {operator.function: operator for operator in OPERATORS}

# The axes of every array argument.
_AXES = {
    "x": "nd", "dy": "ne", "W": "de", "G": "de", "A": "dr", "B": "re", "A_0": "dr", "B_0": "re",
    "A_new": "dr", "B_new": "re", "m_A": "dr", "v_A": "dr", "m_B": "re", "v_B": "re",
    "W_t": "ed", "lora_A": "rd", "lora_B": "er", "parameter": "de", "gradient": "de", "m": "de", "v": "de",
}  # fmt: skip


def _arguments(function: str, make: Callable[..., np.ndarray], sizes: dict[str, int], **numbers: Any) -> dict[str, Any]:
    """Arguments of an operator: arrays by `make`, squares of gradients positive, new factors a short move away."""
    made: dict[str, Any] = {}
    for name in _CALLS[function].parameters:
        if name not in _AXES:
            made[name] = sizes["r"] if name == "r" else numbers[name]
            continue
        array = make(*(sizes[axis] for axis in _AXES[name]))
        if name.endswith("_new"):
            old = made[name[0]]
            array = old + np.sign(array) * numbers.get("move", 0.25)
        made[name] = np.abs(array) if name[0] == "v" else array
    return made


def _case(function: str, name: str, clauses: str, *, exact: bool = False, **arguments: Any) -> Case:
    return Case(f"lora.{function}", name, arguments, tuple(clauses.split()), exact)


# alpha / r with r unlike alpha and not dividing it.
_RULE: dict[str, Any] = {"learning_rate": 0.3, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8, "weight_decay": 0.1}


def _products(function: str, clauses: str, exact_clauses: str) -> list[Case]:
    """Cases of an operator made of products: grids, 24 and 53 bits, one square weight, rank 1, rank above both axes."""
    made = []

    def add(name: str, kind: str, d: int, e: int, r: int, **numbers: Any) -> None:
        draw, exact = Draw(f"lora/{function}/{name}"), kind == "ternary"
        make = {
            "grid": draw.grid,
            "ternary": draw.ternary,
            "dense": draw.dense,
            "double": lambda *shape: draw.dense(*shape, bits=53),
        }[kind]
        rate = {"learning_rate": r / 2 if function == "random_projection_update" else 0.5} if exact else {}
        numbers = {"learning_rate": 0.3, "move": 1.0 if exact else 2.0**-4, **rate, **numbers}
        arguments = _arguments(function, make, {"n": 2, "d": d, "e": e, "r": r}, **numbers)
        made.append(_case(function, name, exact_clauses if exact else clauses, exact=exact, **arguments))

    add("grid", "grid", 5, 7, 3, scale=5 / 3)
    add("square", "grid", 5, 5, 2, scale=-0.7)
    add("rank-one", "grid", 7, 3, 1, scale=0.3)
    add("rank-above-both", "grid", 2, 3, 5, scale=0.4)
    add("dense", "dense", 7, 5, 2, scale=2.5)
    add("double", "double", 3, 5, 2, scale=1 / 3)
    add("exact-wide", "ternary", 5, 7, 3, scale=2.0)
    add("exact-square", "ternary", 5, 5, 2, scale=-0.5)
    add("exact-rank-one", "ternary", 7, 3, 1, scale=4.0)
    add("exact-rank-above-both", "ternary", 2, 3, 5, scale=1.0)
    return made


_SIGNS_D, _SIGNS_E = np.array([1.0, -1.0, -1.0, 1.0, -1.0]), np.array([1.0, 1.0, -1.0])


def _cancelling() -> list[Case]:
    """Large terms that leave one unit: 127 p against 126 p, p a matrix of signs. A part in a thousand shows at once."""
    p = np.outer(_SIGNS_D, _SIGNS_E)
    # scale A B = -126 p.
    A, B, scale = np.outer(_SIGNS_D, np.ones(3)), 21 * np.outer(np.ones(3), _SIGNS_E), -2.0
    column, row = _SIGNS_D[:, None], _SIGNS_E[None, :]
    pair = np.concatenate([64 * column, -63 * column], axis=1)
    G = np.zeros((5, 3))
    G[1], G[3] = 127 * _SIGNS_E, -126 * _SIGNS_E
    one_hot_A, one_hot_B = np.zeros((5, 2)), np.zeros((2, 3))
    one_hot_A[[1, 3], 0] = 1.0
    one_hot_A[1, 1] = one_hot_B[0, 0] = one_hot_B[1, 2] = 1.0
    x, dy = np.zeros((2, 5)), np.zeros((2, 3))
    x[0, 1] = x[1, 1] = x[1, 3] = 1.0
    dy[0], dy[1] = 127 * _SIGNS_E, -126 * _SIGNS_E
    one_column = np.zeros((5, 3))
    one_column[:, 0] = 7 * _SIGNS_D
    return [
        _case("delta", "exact-cancelling", "C1 C4", exact=True, A=pair, B=np.repeat(row, 2, axis=0), scale=0.5),
        _case("apply", "exact-cancelling", "C1 C2", exact=True, x=np.eye(5)[1:4], W=127 * p, A=A, B=B, scale=scale),
        _case("merge", "exact-cancelling", "C1", exact=True, W=127 * p, A=A, B=B, scale=scale),
        _case("unmerge", "exact-cancelling", "C1", exact=True, W=-127 * p, A=A, B=B, scale=scale),
        _case(
            "merge_symmetric", "exact-cancelling", "C3", exact=True, W=2 * p, A=A, B=B, A_0=column, B_0=64 * row,
            scale=scale,
        ),
        _case("gradients_dense", "exact-cancelling", "C2", exact=True, G=G, A=one_hot_A, B=one_hot_B, scale=2.0),
        _case(
            "gradients_factored", "exact-cancelling", "C1 C3", exact=True, x=x, dy=dy, A=one_hot_A, B=one_hot_B,
            scale=2.0,
        ),
        _case("gradient_input", "exact-cancelling", "C1", exact=True, dy=np.eye(3), W=127 * p, A=A, B=B, scale=scale),
        _case(
            "update", "exact-cancelling", "C3", exact=True, A=126 * column, B=row, A_new=127 * column, B_new=row,
            scale=2.0,
        ),
        _case(
            "sgd", "exact-cancelling", "C1", exact=True, A=15 * np.eye(5)[:, :1], B=np.eye(3)[:1],
            G=np.outer(14 * np.eye(5)[0], np.eye(3)[0]), scale=2.0, learning_rate=0.5,
        ),
        # First order -2 (49 p + ...), second order up to the last unit: 7 x 7 x 2 and 7 x 7.
        _case(
            "sgd_update", "exact-cancelling", "C2", exact=True, A=column, B=np.eye(3)[:1], G=one_column, scale=1.0,
            learning_rate=0.25,
        ),
        _case(
            "sgd_frozen", "exact-cancelling", "C1 C2", exact=True, A=one_hot_A[:, 1:], B=127 * row, G=G * 126 / 127,
            scale=2.0, learning_rate=0.5,
        ),
        _case(
            "sgd_frozen_update", "exact-cancelling", "C2", exact=True, A=one_hot_A[:, :1], G=G, scale=1.0,
            learning_rate=0.5,
        ),
        _case(
            "random_projection_update", "exact-cancelling", "C3", exact=True, G=G, A=one_hot_A, B=one_hot_B,
            learning_rate=1.0,
        ),
    ]  # fmt: skip


def _zero_factors() -> list[Case]:
    """The usual start, B = 0: the base alone; the gradient reaches B only."""
    draw = Draw("lora/zero")
    W, A, B, x = draw.ternary(5, 7), draw.ternary(5, 3), np.zeros((3, 7)), draw.grid(2, 5, low=-3, high=3, exponent=0)
    dy, G = draw.ternary(2, 7), draw.ternary(5, 7)
    return [
        _case("apply", "exact-zero-factor", "C3", exact=True, x=x, W=W, A=A, B=B, scale=2.0),
        _case("apply", "exact-zero-scale", "C3", exact=True, x=2 * x, W=W, A=A, B=draw.ternary(3, 7), scale=0.0),
        _case("apply", "exact-no-leading-axis", "C4", exact=True, x=x[0], W=W, A=A, B=draw.ternary(3, 7), scale=2.0),
        _case(
            "apply", "two-leading-axes", "C4", x=draw.grid(2, 3, 5), W=draw.grid(5, 3), A=draw.grid(5, 2),
            B=draw.grid(2, 3), scale=1.4,
        ),
        _case("merge", "exact-zero-factor", "C2", exact=True, W=draw.grid(5, 7), A=0 * A, B=B, scale=2.0),
        _case("unmerge", "exact-zero-factor", "C3", exact=True, W=draw.grid(5, 7), A=A, B=B, scale=2.0),
        _case(
            "merge_symmetric", "exact-start", "C1", exact=True, W=W, A=A, B=draw.ternary(3, 7), A_0=A,
            B_0=B, scale=0.5,
        ),
        _case("gradients_dense", "exact-zero-factor", "C1", exact=True, G=G, A=A, B=B, scale=2.0),
        _case(
            "gradients_factored", "two-leading-axes", "C3", x=draw.grid(2, 3, 5), dy=draw.grid(2, 3, 7),
            A=draw.grid(5, 2), B=draw.grid(2, 7), scale=1.4,
        ),
        _case("gradients_factored", "exact-zero-factor", "C3", exact=True, x=x, dy=dy, A=A, B=B, scale=2.0),
        _case("gradient_input", "exact-zero-factor", "C2", exact=True, dy=dy, W=W, A=A, B=B, scale=2.0),
        _case("sgd", "exact-zero-rate", "C2", exact=True, A=A, B=draw.ternary(3, 7), G=G, scale=2.0, learning_rate=0.0),
    ]  # fmt: skip


def _scales() -> list[Case]:
    table = ((16.0, 8), (5.0, 3), (8, 4), (1.0, 64), (-0.3, 7), (32.0, 1), (6, 16), (0.7, 2))
    return [
        _case(function, f"alpha-{alpha:g}-r-{r}", clauses, alpha=alpha, r=r)
        for function, clauses in (("scale_lora", "C1 C2"), ("scale_rslora", "C1 C2"))
        for alpha, r in table
    ]


def _optimisers() -> list[Case]:
    made = []

    def add(function: str, name: str, clauses: str, exponent: int = -6, **changes: Any) -> None:
        draw = Draw(f"lora/{function}/{name}")
        bits = changes.pop("bits", 0)

        def make(*shape: int) -> np.ndarray:
            return draw.dense(*shape, bits=bits) if bits else draw.grid(*shape, exponent=exponent)

        arguments = _arguments(
            function, make, {"d": 3, "e": 5, "r": 2}, **{"step": 3, "scale": 5 / 3, **_RULE, **changes}
        )
        made.append(_case(function, name, clauses, **arguments))

    coarse: dict[str, Any] = {
        "beta_1": 0.75,
        "beta_2": 0.5,
        "epsilon": 0.125,
        "learning_rate": 0.5,
        "weight_decay": 0.25,
    }
    for function in ("adamw_array", "adamw"):
        add(function, "grid", "C1 C2", **coarse)
        add(function, "dense", "C1 C2", bits=24)
        add(function, "double", "C1 C2", bits=53, step=1000)
        add(function, "no-decay", "C1", weight_decay=0.0, epsilon=0.01, step=2)
        # Gradients of the size of epsilon: added inside the root or before the correction, it parts company here.
        add(function, "near-epsilon", "C2", exponent=-33, step=2, scale=0.7, weight_decay=0.0)
        add(function, "large-epsilon", "C2", epsilon=1.0, step=1, beta_2=0.9)
        add(function, "no-averages", "C1 C2", beta_1=0.0, beta_2=0.0, epsilon=1.0, step=7)
    zero, some = np.zeros((3, 5)), Draw("lora/some").grid(3, 5)
    some[:, 1:4] = 0.0
    made += [
        # m and v are zero and the root is 3 or 0: every value is a few bits.
        _case(
            "adamw_array", "exact-first-step", "C3", exact=True, parameter=np.array([1.0, 2.0, -1.0, 0.5]),
            gradient=np.array([3.0, -3.0, 0.0, 1.0]), m=np.zeros(4), v=np.zeros(4), step=1, learning_rate=0.5,
            beta_1=0.5, beta_2=0.75, epsilon=1.0, weight_decay=0.5,
        ),
        _case(
            "adamw_array", "first-step", "C3", parameter=Draw("lora/first").grid(3, 5), m=zero, v=zero,
            gradient=Draw("lora/first-gradient").grid(3, 5), step=1, **{**_RULE, "epsilon": 0.1},
        ),
        _case(
            "adamw_array", "zero-gradients", "C4", parameter=Draw("lora/zero-gradient").grid(3, 5), m=zero, v=zero,
            gradient=some, step=1, **{**_RULE, "epsilon": 0.5, "weight_decay": 0.5},
        ),
        _case(
            "adamw", "zero-states", "C2", A=Draw("lora/zero-states").grid(3, 2), B=Draw("lora/zero-B").grid(2, 5),
            G=Draw("lora/zero-G").grid(3, 5), m_A=np.zeros((3, 2)), v_A=np.zeros((3, 2)), m_B=np.zeros((2, 5)),
            v_B=np.zeros((2, 5)), scale=0.4, step=1, **{**_RULE, "epsilon": 0.125},
        ),
    ]  # fmt: skip
    return made


def _additives() -> list[Case]:
    made = []
    sizes = {
        "residues": ("grid", 6, 9, 3),
        "rank-one": ("grid", 5, 7, 1),
        "dense": ("dense", 6, 10, 2),
        "exact-residues": ("ternary", 6, 9, 3),
        "exact-rank-one": ("ternary", 5, 3, 1),
        "exact-rank-two": ("ternary", 6, 4, 2),
        "exact-one-block": ("ternary", 3, 3, 3),
        "exact-tall": ("ternary", 10, 5, 5),
    }
    for function, clauses in (
        ("additive_delta", "C1 C2 C3"),
        ("additive_gradients", "C1 C2"),
        ("additive_update", "C1 C2"),
    ):
        for name, (kind, d, e, r) in sizes.items():
            draw, exact, taken = Draw(f"lora/{function}/{name}"), kind == "ternary", count()

            def make(*shape: int, draw: Draw = draw, kind: str = kind, taken: Iterator[int] = taken) -> np.ndarray:
                if kind == "ternary":
                    return draw.ternary(*shape)
                # A and B of different magnitude, so that their sum is rounded.
                return np.ldexp(draw.grid(*shape) if kind == "grid" else draw.dense(*shape), 5 * next(taken))

            rate = 0.5 if exact else 0.3
            arguments = _arguments(function, make, {"d": d, "e": e, "r": r}, learning_rate=rate)
            made.append(_case(function, name, clauses, exact=exact, **arguments))
    return made


def _orientations() -> list[Case]:
    made = []
    for function in ("from_peft", "to_peft"):
        for d, e, r in ((5, 7, 3), (7, 5, 2), (5, 5, 5), (3, 3, 1), (2, 3, 5), (1, 7, 2)):
            draw = Draw(f"lora/{function}/{d}-{e}-{r}")
            arguments = _arguments(function, draw.grid, {"d": d, "e": e, "r": r})
            made.append(_case(function, f"exact-d{d}-e{e}-r{r}", "C1 C3", exact=True, **arguments))
    return made


_CLAUSES = {
    "delta": ("C1 C4", "C1 C4"),
    "apply": ("C1 C2 C4", "C1 C2 C4"),
    "merge": ("C1", "C1"),
    "unmerge": ("C1 C2", "C1"),
    "merge_symmetric": ("C3", "C3"),
    "gradients_dense": ("C2", "C2"),
    "gradients_factored": ("C1 C2 C3", "C1 C2 C3"),
    "gradient_input": ("C1", "C1"),
    "update": ("C1 C2 C3", "C1 C3"),
    "sgd": ("C1", "C1"),
    "sgd_update": ("C1 C2", "C1 C2"),
    "sgd_frozen": ("C1 C2", "C1 C2"),
    "sgd_frozen_update": ("C1 C2", "C1 C2"),
    "random_projection_update": ("C2", "C2"),
}

CASES = (
    *_scales(),
    *(case for function, clauses in _CLAUSES.items() for case in _products(function, *clauses)),
    *_cancelling(),
    *_zero_factors(),
    *_optimisers(),
    *_additives(),
    *_orientations(),
)


# Laws.
def _named(*functions: str) -> tuple[str, ...]:
    return tuple(f"lora.{function}" for function in functions)


_LAYERS = ("delta", "apply", "merge", "unmerge", "merge_symmetric", "gradient_input")


def _one_hot(rows: int, columns: int, i: int, j: int, value: float = 1.0) -> np.ndarray:
    made = np.zeros((rows, columns))
    made[i, j] = value
    return made


def _sizes(case: Case) -> tuple[int, int, int]:
    """d, e and r of a case."""
    (d, r), e = case["A"].shape, case["B"].shape[1]
    return d, e, r


def _identity_input(case: Case) -> dict[str, np.ndarray]:
    """Changes that show the weight itself: unit rows in, nothing but the two factors in the weight."""
    d, e, _ = _sizes(case)
    made = {"x": np.eye(d), "dy": np.eye(e), "W": np.zeros((d, e))}
    made |= {name: np.zeros_like(case[name]) for name in ("A_0", "B_0") if name in case.arguments}
    return {name: value for name, value in made.items() if name in case.arguments}


def _as_weight(case: Case, output: Output) -> tuple[np.ndarray, np.ndarray]:
    """An output for unit rows, oriented as (d, e)."""
    flipped = case.op == "lora.gradient_input"
    return (output.value.T, output.radius.T) if flipped else (output.value, output.radius)


def one_hot_factors_place_the_scale(implementation: Function, case: Case) -> None:
    """A = E_ik and B = E_kj put scale (unmerge: -scale) at i, j of the weight, and nothing elsewhere."""
    d, e, r = _sizes(case)
    sign = -1.0 if case.op == "lora.unmerge" else 1.0
    for i, j, k in ((d - 1, 0, r - 1), (0, e - 1, 0)):
        factors = {"A": _one_hot(d, r, i, k), "B": _one_hot(r, e, k, j)}
        output = run(implementation, case, **_identity_input(case), **factors)[0]
        value, radius = _as_weight(case, output)
        close("one_hot_factors_place_the_scale", case, value, _one_hot(d, e, i, j, sign * case["scale"]), radius)


def zero_factor_gives_the_base(implementation: Function, case: Case) -> None:
    """With A = 0 or B = 0 the weight is W, or 0 where there is none."""
    shown = {name: value for name, value in _identity_input(case).items() if name != "W"}
    base = case["W"] if "W" in case.arguments else np.zeros(_sizes(case)[:2])
    for name in ("A", "B"):
        value, radius = _as_weight(case, run(implementation, case, **shown, **{name: np.zeros_like(case[name])})[0])
        close("zero_factor_gives_the_base", case, value, base, radius)


def scale_is_affine(implementation: Function, case: Case) -> None:
    """f(4) - f(0) = 4 (f(1) - f(0)) in the scale."""
    zero, one, four = (run(implementation, case, scale=s) for s in (0.0, 1.0, 4.0))
    for f_0, f_1, f_4 in zip(zero, one, four, strict=True):
        tolerance = f_4.radius + 3 * f_0.radius + 4 * f_1.radius
        close("scale_is_affine", case, f_4.value + 3 * f_0.value, 4 * f_1.value, tolerance)


def powers_of_two_move_between_the_factors(implementation: Function, case: Case) -> None:
    """A R and R^-1 B make the same weight, R a diagonal of powers of two."""
    powers = np.exp2(np.arange(case["A"].shape[1]) % 3 - 1)
    one = run(implementation, case)[0]
    two = run(implementation, case, A=case["A"] * powers, B=case["B"] / powers[:, None])[0]
    close("powers_of_two_move_between_the_factors", case, two.value, one.value, one.radius + two.radius)


def start_of_the_symmetric_form_is_the_base(implementation: Function, case: Case) -> None:
    """A = A_0 and B = B_0 give W; a zero start gives the plain merge."""
    same = run(implementation, case, A_0=case["A"], B_0=case["B"])[0]
    close("start_of_the_symmetric_form_is_the_base", case, same.value, case["W"], same.radius)
    d, e, r = _sizes(case)
    changes = {"A": np.zeros((d, r)), "W": np.zeros((d, e)), "A_0": _one_hot(d, r, 0, 0), "B_0": _one_hot(r, e, 0, 1)}
    alone = run(implementation, case, **changes)[0]
    expected = _one_hot(d, e, 0, 1, -case["scale"])
    close("start_of_the_symmetric_form_is_the_base", case, alone.value, expected, alone.radius)


def rows_are_independent(implementation: Function, case: Case) -> None:
    """Changing the first row leaves the others as they are, bit for bit; no rows give no rows."""
    name = "x" if "x" in case.arguments else "dy"
    changed = case[name].copy()
    changed[0] = 1 - 2 * changed[0]
    kept = run(implementation, case)[0].value[1:]
    equal("rows_are_independent", case, run(implementation, case, **{name: changed})[0].value[1:], kept)
    run(implementation, case, **{name: changed[:0]})


def arguments_are_not_aliased(implementation: Function, case: Case) -> None:
    """Writing into a result changes no argument."""
    arguments = storage_arguments(case)
    kept = {name: value.copy() for name, value in arguments.items() if isinstance(value, np.ndarray)}
    for result in as_tuple(implementation(**arguments)):
        if isinstance(result, np.ndarray) and result.flags.writeable:
            result[...] = 3.0
    for name, before in kept.items():
        if arguments[name].tobytes() != before.tobytes():
            raise LawFailed(
                f"{case.op} law arguments_are_not_aliased ({case.profile}): a result shares memory of {name}"
            )


def one_hot_gradient_copies_the_factors(implementation: Function, case: Case) -> None:
    """G = E_ij gives dA = scale (column j of B) in row i, dB = scale (row i of A) in column j, and zeros elsewhere."""
    d, e, r = _sizes(case)
    for i, j in ((d - 1, 0), (0, e - 1)):
        if "G" in case.arguments:
            changes = {"G": _one_hot(d, e, i, j)}
        else:
            changes = {"x": _one_hot(3, d, 1, i), "dy": _one_hot(3, e, 1, j)}
        dA, dB = run(implementation, case, **changes)
        expected_A, expected_B = np.zeros((d, r)), np.zeros((r, e))
        expected_A[i], expected_B[:, j] = case["scale"] * case["B"][:, j], case["scale"] * case["A"][i]
        close("one_hot_gradient_copies_the_factors", case, dA.value, expected_A, dA.radius)
        close("one_hot_gradient_copies_the_factors", case, dB.value, expected_B, dB.radius)


def rows_add_up(implementation: Function, case: Case) -> None:
    """All leading axes are summed: x stacked on -2 x over equal dy gives minus the gradients; no rows give zeros."""
    x, dy = case["x"], case["dy"]
    plain = run(implementation, case)
    stacked = run(implementation, case, x=np.stack([x, -2 * x]), dy=np.stack([dy, dy]))
    for one, two in zip(plain, stacked, strict=True):
        close("rows_add_up", case, two.value, -one.value, one.radius + two.radius)
    for output in run(implementation, case, x=x[:0], dy=dy[:0]):
        equal("rows_add_up", case, output.value, np.zeros_like(output.value))


def unmoved_factors_give_zero(implementation: Function, case: Case) -> None:
    """Equal old and new factors give zero; the way back is minus the way there."""
    there = run(implementation, case)[0]
    swapped = {"A": case["A_new"], "B": case["B_new"], "A_new": case["A"], "B_new": case["B"]}
    back = run(implementation, case, **swapped)[0]
    close("unmoved_factors_give_zero", case, back.value, -there.value, there.radius + back.radius)
    still = run(implementation, case, A_new=case["A"], B_new=case["B"])[0]
    close("unmoved_factors_give_zero", case, still.value, np.zeros_like(still.value), still.radius)


def one_moved_entry_shows_the_other_factor(implementation: Function, case: Case) -> None:
    """From zero, A = E_ik and the old or new B give scale (row k of B) in row i; both moved count together."""
    d, e, r = _sizes(case)
    entry, B = _one_hot(d, r, d - 1, r - 1), case["B"]
    expected = np.zeros((d, e))
    expected[d - 1] = case["scale"] * B[r - 1]
    for old_B in (B, np.zeros_like(B)):
        moved = run(implementation, case, A=np.zeros((d, r)), B=old_B, A_new=entry, B_new=B)[0]
        close("one_moved_entry_shows_the_other_factor", case, moved.value, expected, moved.radius)


def one_hot_gradient_moves_a_row_and_a_column(implementation: Function, case: Case) -> None:
    """G = E_ij moves row i of A by the old column j of B, and column j of B by the old row i of A."""
    d, e, r = _sizes(case)
    rate = case["learning_rate"] * case["scale"]
    for i, j in ((d - 1, 0), (0, e - 1)):
        outputs = run(implementation, case, G=_one_hot(d, e, i, j))
        A, B = case["A"].copy(), case["B"].copy()
        A[i] -= rate * case["B"][:, j]
        B[:, j] -= rate * case["A"][i]
        for output, expected in zip(outputs, (B,) if len(outputs) == 1 else (A, B), strict=True):
            close("one_hot_gradient_moves_a_row_and_a_column", case, output.value, expected, output.radius)


def one_hot_gradient_gives_a_cross(implementation: Function, case: Case) -> None:
    """G = E_ij gives E_ij B^T B in row i, A A^T E_ij in column j, the second order at i, j alone; G = 0 gives 0."""
    (d, r), e = case["A"].shape, case["G"].shape[1]
    scale, rate = case.arguments.get("scale", 1.0), case["learning_rate"]
    for i, j in ((d - 1, 0), (0, e - 1)):
        output = run(implementation, case, G=_one_hot(d, e, i, j))[0]
        expected = np.zeros((d, e))
        if "B" in case.arguments:
            expected[i] += case["B"][:, j] @ case["B"]
        expected[:, j] += case["A"] @ case["A"][i]
        if case.op == "lora.random_projection_update":
            expected *= -rate / r
        else:
            expected *= -rate * scale**2
        if case.op == "lora.sgd_update":
            expected[i, j] += rate**2 * scale**3 * (case["B"][:, j] @ case["A"][i])
        # The radius is the reference's; the plain products above are float64.
        close("one_hot_gradient_gives_a_cross", case, output.value, expected, output.radius + 1e-13 * np.abs(expected))
    none = run(implementation, case, G=np.zeros((d, e)))[0]
    close("one_hot_gradient_gives_a_cross", case, none.value, np.zeros((d, e)), none.radius)


def orders_of_the_scale(implementation: Function, case: Case) -> None:
    """The first order is even in the scale, the second odd: they double and double twice with learning_rate."""
    parts = []
    for rate in (0.5, 1.0):
        plus, minus = (run(implementation, case, scale=s, learning_rate=rate)[0] for s in (1.0, -1.0))
        radius = plus.radius + minus.radius
        parts.append((plus.value + minus.value, plus.value - minus.value, radius))
    (even, odd, small), (even_2, odd_2, large) = parts
    close("orders_of_the_scale", case, even_2, 2 * even, large + 2 * small)
    close("orders_of_the_scale", case, odd_2, 4 * odd, large + 4 * small)


def repeated_factors_change_nothing(implementation: Function, case: Case) -> None:
    """Every column of A and row of B twice: the mean over columns is the same."""
    one = run(implementation, case)[0]
    twice = {"A": np.concatenate([case["A"]] * 2, axis=1), "B": np.concatenate([case["B"]] * 2)}
    two = run(implementation, case, **twice)[0]
    close("repeated_factors_change_nothing", case, two.value, one.value, one.radius + two.radius)


def states_are_running_means(implementation: Function, case: Case) -> None:
    """m = beta_1 m + (1 - beta_1) g and v likewise of g^2, decay or not; g = 1 for all."""
    gradient = np.ones_like(case["gradient"])
    for decay in (0.0, 0.5):
        _, m, v = run(implementation, case, gradient=gradient, beta_1=0.75, beta_2=0.5, weight_decay=decay)
        close("states_are_running_means", case, m.value, 0.75 * case["m"] + 0.25, m.radius)
        close("states_are_running_means", case, v.value, 0.5 * case["v"] + 0.5, v.radius)


def constant_gradient_moves_by_the_rate(implementation: Function, case: Case) -> None:
    """An unchanging gradient g moves by learning_rate g / (|g| + epsilon) at every step: both means are corrected."""
    g = np.where(case["gradient"] < 0, -2.0, 2.0)
    rate, epsilon = case["learning_rate"], 0.5
    for step in (1, 2, 3):
        changes = {"gradient": g, "m": (1 - 0.5 ** (step - 1)) * g, "v": (1 - 0.75 ** (step - 1)) * g * g}
        numbers = {"step": step, "beta_1": 0.5, "beta_2": 0.75, "epsilon": epsilon, "weight_decay": 0.0}
        moved = run(implementation, case, **changes, **numbers)[0]
        expected = case["parameter"] - rate * g / (2.0 + epsilon)
        close("constant_gradient_moves_by_the_rate", case, moved.value, expected, moved.radius)


def decay_is_decoupled(implementation: Function, case: Case) -> None:
    """weight_decay takes learning_rate weight_decay parameter away, whatever the gradient."""
    with_, without = (run(implementation, case, weight_decay=decay, epsilon=0.5)[0] for decay in (0.5, 0.0))
    expected = -case["learning_rate"] * 0.5 * case["parameter"]
    close("decay_is_decoupled", case, with_.value - without.value, expected, with_.radius + without.radius)


def first_step_is_the_normalised_gradient(implementation: Function, case: Case) -> None:
    """From zero states and G = E_ij both factors move by learning_rate g / (|g| + epsilon), g = scale of the other."""
    d, e, r = _sizes(case)
    states = {name: np.zeros_like(case[name]) for name in ("m_A", "v_A", "m_B", "v_B")}
    numbers = {"step": 1, "beta_1": 0.5, "beta_2": 0.75, "epsilon": 0.5, "weight_decay": 0.0}
    for i, j in ((d - 1, 0), (0, e - 1)):
        A, B, m_A, v_A, m_B, v_B = run(implementation, case, G=_one_hot(d, e, i, j), **states, **numbers)
        dA, dB = np.zeros((d, r)), np.zeros((r, e))
        dA[i], dB[:, j] = case["scale"] * case["B"][:, j], case["scale"] * case["A"][i]
        for new, old, g, m, v in ((A, case["A"], dA, m_A, v_A), (B, case["B"], dB, m_B, v_B)):
            expected = old - case["learning_rate"] * g / (np.abs(g) + 0.5)
            close("first_step_is_the_normalised_gradient", case, new.value, expected, new.radius)
            close("first_step_is_the_normalised_gradient", case, m.value, 0.5 * g, m.radius)
            close("first_step_is_the_normalised_gradient", case, v.value, 0.25 * g * g, v.radius)


def zero_gradient_lets_the_states_fade(implementation: Function, case: Case) -> None:
    """G = 0 shrinks m and v by beta_1 and beta_2 and moves each factor by its own m and v."""
    numbers = {"step": 2, "beta_1": 0.5, "beta_2": 0.5, "epsilon": 1.0, "weight_decay": 0.5}
    A, B, m_A, v_A, m_B, v_B = run(implementation, case, G=np.zeros_like(case["G"]), **numbers)
    rate = case["learning_rate"]
    for new, m, v, name in ((A, m_A, v_A, "A"), (B, m_B, v_B, "B")):
        old_m, old_v = case[f"m_{name}"], case[f"v_{name}"]
        close("zero_gradient_lets_the_states_fade", case, m.value, 0.5 * old_m, m.radius)
        close("zero_gradient_lets_the_states_fade", case, v.value, 0.5 * old_v, v.radius)
        move = (0.5 * old_m / 0.75) / (np.sqrt(0.5 * old_v / 0.75) + 1.0)
        expected = case[name] * (1 - 0.5 * rate) - rate * move
        close("zero_gradient_lets_the_states_fade", case, new.value, expected, new.radius)


def one_entry_repeats_by_residue(implementation: Function, case: Case) -> None:
    """A = E_ik fills row i at the columns equal to k modulo r; B = E_kj fills column j at such rows."""
    d, e, r = _sizes(case)
    for k in {0, r - 1}:
        row, column = np.zeros((d, e)), np.zeros((d, e))
        row[d - 1, k::r], column[k::r, 0] = 1.0, 1.0
        from_A = run(implementation, case, A=_one_hot(d, r, d - 1, k), B=np.zeros((r, e)))[0]
        from_B = run(implementation, case, A=np.zeros((d, r)), B=_one_hot(r, e, k, 0))[0]
        close("one_entry_repeats_by_residue", case, from_A.value, row, from_A.radius)
        close("one_entry_repeats_by_residue", case, from_B.value, column, from_B.radius)


def one_entry_of_the_gradient_reaches_two(implementation: Function, case: Case) -> None:
    """G = E_ij gives dA = E_i,(j mod r) and dB = E_(i mod r),j; gradients add up."""
    (d, e), r = case["G"].shape, case["r"]
    for i, j in ((d - 1, 0), (1, e - 2)):
        dA, dB = run(implementation, case, G=_one_hot(d, e, i, j))
        close("one_entry_of_the_gradient_reaches_two", case, dA.value, _one_hot(d, r, i, j % r), dA.radius)
        close("one_entry_of_the_gradient_reaches_two", case, dB.value, _one_hot(r, e, i % r, j), dB.radius)
    for output, times in zip(run(implementation, case, G=np.ones((d, e))), (e // r, d // r), strict=True):
        close(
            "one_entry_of_the_gradient_reaches_two",
            case,
            output.value,
            np.full_like(output.value, times),
            output.radius,
        )


def one_entry_of_the_gradient_gives_a_comb(implementation: Function, case: Case) -> None:
    """G = E_ij gives -learning_rate along row i at columns equal to j modulo r, and along column j likewise."""
    (d, e), r, rate = case["G"].shape, case["r"], case["learning_rate"]
    for i, j in ((d - 1, 0), (1, e - 2)):
        expected = np.zeros((d, e))
        expected[i, j % r :: r] -= rate
        expected[i % r :: r, j] -= rate
        output = run(implementation, case, G=_one_hot(d, e, i, j))[0]
        close("one_entry_of_the_gradient_gives_a_comb", case, output.value, expected, output.radius)


def everything_is_transposed(implementation: Function, case: Case) -> None:
    """Every result is the transpose of its argument, bit for bit."""
    for output, argument in zip(run(implementation, case), case.arguments.values(), strict=True):
        equal("everything_is_transposed", case, output.value, argument.T)


def scale_follows_alpha_and_r(implementation: Function, case: Case) -> None:
    """Proportional to alpha; alpha itself at r = 1; four times the rank divides by 4, by 2 where rank-stabilised."""
    law, alpha, r = "scale_follows_alpha_and_r", case["alpha"], case["r"]
    one = run(implementation, case)[0]
    doubled = run(implementation, case, alpha=-2 * alpha)[0]
    close(law, case, doubled.value, -2 * one.value, doubled.radius + 2 * one.radius)
    unit = run(implementation, case, r=1)[0]
    close(law, case, unit.value, alpha, unit.radius)
    factor = 2 if case.op == "lora.scale_rslora" else 4
    wide = run(implementation, case, r=4 * r)[0]
    close(law, case, factor * wide.value, one.value, factor * wide.radius + one.radius)


LAWS = (
    Law(scale_follows_alpha_and_r, _named("scale_lora", "scale_rslora"), ("C1", "C2")),
    Law(one_hot_factors_place_the_scale, _named(*_LAYERS), ("C1",)),
    Law(zero_factor_gives_the_base, _named("delta", "apply"), ("C3",)),
    Law(zero_factor_gives_the_base, _named("merge", "unmerge"), ("C1",)),
    Law(zero_factor_gives_the_base, _named("gradient_input", "merge_symmetric"), ("C2",)),
    Law(scale_is_affine, _named(*_LAYERS, "update", "gradients_factored"), ("C1",)),
    Law(scale_is_affine, _named("gradients_dense"), ("C2",)),
    Law(powers_of_two_move_between_the_factors, _named("delta"), ("C2",)),
    Law(powers_of_two_move_between_the_factors, _named("apply", "merge", "unmerge"), ("C1",)),
    Law(start_of_the_symmetric_form_is_the_base, _named("merge_symmetric"), ("C1", "C2", "C3")),
    Law(rows_are_independent, _named("apply"), ("C4",)),
    Law(rows_are_independent, _named("gradient_input"), ("C1",)),
    Law(arguments_are_not_aliased, _named("merge", "from_peft", "to_peft"), ("C2",)),
    Law(arguments_are_not_aliased, _named("unmerge"), ("C3",)),
    Law(one_hot_gradient_copies_the_factors, _named("gradients_dense", "gradients_factored"), ("C1",)),
    Law(rows_add_up, _named("gradients_factored"), ("C3",)),
    Law(unmoved_factors_give_zero, _named("update"), ("C3",)),
    Law(one_moved_entry_shows_the_other_factor, _named("update"), ("C1",)),
    Law(one_hot_gradient_moves_a_row_and_a_column, _named("sgd", "sgd_frozen"), ("C1",)),
    Law(one_hot_gradient_gives_a_cross, _named("sgd_update"), ("C1", "C2", "C3")),
    Law(one_hot_gradient_gives_a_cross, _named("sgd_frozen_update"), ("C1", "C2")),
    Law(one_hot_gradient_gives_a_cross, _named("random_projection_update"), ("C2", "C3")),
    Law(orders_of_the_scale, _named("sgd_update"), ("C2",)),
    Law(repeated_factors_change_nothing, _named("random_projection_update"), ("C1",)),
    Law(states_are_running_means, _named("adamw_array"), ("C1",)),
    Law(constant_gradient_moves_by_the_rate, _named("adamw_array"), ("C2", "C3")),
    Law(decay_is_decoupled, _named("adamw_array"), ("C1", "C4")),
    Law(first_step_is_the_normalised_gradient, _named("adamw"), ("C1", "C2")),
    Law(zero_gradient_lets_the_states_fade, _named("adamw"), ("C1", "C3")),
    Law(one_entry_repeats_by_residue, _named("additive_delta"), ("C1", "C2")),
    Law(one_entry_of_the_gradient_reaches_two, _named("additive_gradients"), ("C1", "C2")),
    Law(one_entry_of_the_gradient_gives_a_comb, _named("additive_update"), ("C1", "C2")),
    Law(everything_is_transposed, _named("from_peft", "to_peft"), ("C1", "C3")),
)


def strategy(function: str, profile: Profile) -> st.SearchStrategy[Case]:
    """Weights of 2 to 4 by 2 to 4, rank 1 to 5 (a divisor of both axes for the additive form), few-bit entries."""
    name = f"lora.{function}"
    scales = st.sampled_from([0.5, -2.0, 5 / 3, 4.0])
    if function.startswith("scale"):

        def numbers(draw: Draw, alpha: float, r: int) -> dict[str, Any]:
            return {"alpha": alpha, "r": r}

        return drawn(name, profile, numbers, alpha=st.sampled_from([16.0, -0.75, 5.0, 0.3]), r=st.integers(2, 9))

    additive = function.startswith("additive")

    def build(draw: Draw, d: int, e: int, r: int, scale: float, rate: float, step: int) -> dict[str, Any]:
        def make(*shape: int) -> np.ndarray:
            return draw.grid(*shape, low=-7, high=7, exponent=-2)

        sizes = {"n": 2, "d": d * r if additive else d, "e": e * r if additive else e, "r": r}
        rule = {**_RULE, "epsilon": 0.125, "learning_rate": rate, "scale": scale, "step": step}
        return _arguments(function, make, sizes, **rule)

    return drawn(
        name, profile, build, d=st.integers(2, 4), e=st.integers(2, 4), r=st.integers(1, 3 if additive else 5),
        scale=scales, rate=st.sampled_from([0.125, 0.3]), step=st.integers(1, 4),
    )  # fmt: skip


# Wrong implementations.
def _wrong(function: str, bug: str, call: Function, url: str = "", *, precision: bool = False) -> Mutant:
    return Mutant(f"lora.{function}", bug, call, url, precision=precision)


def _same_bytes(array: np.ndarray) -> np.ndarray:
    """The other shape over the same memory: a transposition forgotten."""
    return array.reshape(array.shape[::-1])


def _square(W: np.ndarray) -> bool:
    return W.shape[0] == W.shape[1]


def _sequential(A: Any, B: Any, G: Any, scale: float, learning_rate: float) -> Any:
    A = A - learning_rate * scale * G @ B.T
    return A, B - learning_rate * scale * A.T @ G


def _adam(
    parameter: Any, gradient: Any, m: Any, v: Any, step: int, learning_rate: float, beta_1: float, beta_2: float,
    epsilon: float, weight_decay: float, *, coupled: bool = False, correct_1: bool = True, correct_2: bool = True,
    inside: bool = False, early: bool = False, bare_decay: bool = False, after: bool = False, late: int = 0,
    absolute: bool = False, nesterov: bool = False,
) -> Any:  # fmt: skip
    """AdamW with one thing wrong."""
    if coupled:
        gradient, weight_decay = gradient + weight_decay * parameter, 0.0
    step = step + late
    m = beta_1 * m + (1 - beta_1) * gradient
    v = beta_2 * v + (1 - beta_2) * (np.abs(gradient) if absolute else gradient**2)
    c_1 = 1 - beta_1**step if correct_1 else 1.0
    c_2 = 1 - beta_2**step if correct_2 else 1.0
    mean = (beta_1 * m + (1 - beta_1) * gradient if nesterov else m) / c_1
    if inside:
        root = np.sqrt(v / c_2 + epsilon)
    elif early:
        root = (np.sqrt(v) + epsilon) / np.sqrt(c_2)
    else:
        root = np.sqrt(v / c_2) + epsilon
    keep = 1 - (1.0 if bare_decay else learning_rate) * weight_decay
    if after:
        return (parameter - learning_rate * mean / root) * keep, m, v
    return parameter * keep - learning_rate * mean / root, m, v


def _adam_wrong(bug: str, **fault: Any) -> Mutant:
    return _wrong("adamw_array", bug, lambda **arguments: _adam(**arguments, **fault))


def _adamw_sequential(A: Any, B: Any, G: Any, m_A: Any, v_A: Any, m_B: Any, v_B: Any, scale: float, **rule: Any) -> Any:
    A, m_A, v_A = _adam(A, scale * G @ B.T, m_A, v_A, **rule)
    B, m_B, v_B = _adam(B, scale * A.T @ G, m_B, v_B, **rule)
    return A, B, m_A, v_A, m_B, v_B


def _adamw_dense(A: Any, B: Any, G: Any, m_A: Any, v_A: Any, m_B: Any, v_B: Any, scale: float, **rule: Any) -> Any:
    """AdamW's direction of the dense gradient, projected afterwards."""
    zero = np.zeros_like(G)
    direction = -_adam(zero, G, zero, zero, **{**rule, "learning_rate": 1.0, "weight_decay": 0.0})[0]
    keep = 1 - rule["learning_rate"] * rule["weight_decay"]
    new_A = A * keep - rule["learning_rate"] * scale * direction @ B.T
    new_B = B * keep - rule["learning_rate"] * scale * A.T @ direction
    return new_A, new_B, m_A, v_A, m_B, v_B


def _adamw_unscaled(**arguments: Any) -> Any:
    return lora.adamw(**{**arguments, "scale": 1.0})


def _adamw_fresh_states(m_A: Any, v_A: Any, m_B: Any, v_B: Any, **arguments: Any) -> Any:
    return lora.adamw(m_A=0 * m_A, v_A=0 * v_A, m_B=0 * m_B, v_B=0 * v_B, **arguments)


def _adamw_only_B(A: Any, m_A: Any, v_A: Any, **arguments: Any) -> Any:
    made = lora.adamw(A=A, m_A=m_A, v_A=v_A, **arguments)
    return A, made.B, m_A, v_A, made.m_B, made.v_B


def _blocks(A: Any, B: Any) -> Any:
    (d, r), e = A.shape, B.shape[1]
    return np.repeat(A, e // r, axis=1) + np.repeat(B, d // r, axis=0)


def _block_gradients(G: Any, r: int) -> Any:
    d, e = G.shape
    return G.reshape(d, r, e // r).sum(axis=2), G.reshape(r, d // r, e).sum(axis=1)


def _mean_gradients(G: Any, r: int) -> Any:
    d, e = G.shape
    return G.reshape(d, e // r, r).mean(axis=1), G.reshape(d // r, r, e).mean(axis=0)


def _factored(x: Any, dy: Any, A: Any, B: Any, scale: float, *, mean: bool = False, last: bool = False) -> Any:
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    if last:
        x, dy = x[-1:], dy[-1:]
    n = max(len(x), 1) if mean else 1
    return scale * x.T @ (dy @ B.T) / n, scale * (x @ A).T @ dy / n


def _first(rows: Any) -> Any:
    return rows.reshape(-1, *rows.shape[-2:])[0]


def _round_half_bytes(W: Any) -> Any:
    """Symmetric 4-bit quantisation of each column."""
    step = np.abs(W).max(axis=0, keepdims=True) / 7
    return np.rint(W / np.where(step > 0, step, 1.0)) * step


def _bfloat16(W: Any) -> Any:
    return round_to(np.asarray(W, np.float64), "bfloat16")


MUTANTS = (
    _wrong("scale_lora", "the root of r instead of r", lambda alpha, r: alpha / np.sqrt(r)),
    _wrong("scale_lora", "r / alpha", lambda alpha, r: r / alpha),
    _wrong("scale_lora", "integer division", lambda alpha, r: float(alpha // r)),
    _wrong("scale_lora", "divided twice", lambda alpha, r: alpha / r**2),
    _wrong("scale_rslora", "multiplied by the root", lambda alpha, r: alpha * np.sqrt(r)),
    _wrong("scale_rslora", "the root of alpha / r", lambda alpha, r: np.sqrt(abs(alpha) / r)),
    _wrong("delta", "scale squared", lambda A, B, scale: scale**2 * A @ B),
    _wrong("delta", "transposed where square", lambda A, B, scale: scale * ((A @ B).T if _square(A @ B) else A @ B)),
    _wrong("delta", "the last column of A left out", lambda A, B, scale: scale * A[:, :-1] @ B[:-1]),
    _wrong("delta", "B read in the other memory order", lambda A, B, scale: scale * A @ _same_bytes(B).T),
    _wrong("delta", "a part in a thousand too small", lambda A, B, scale: 0.999 * scale * A @ B),
    _wrong("apply", "scale on the base as well", lambda x, W, A, B, scale: scale * (x @ W + x @ A @ B)),
    _wrong("apply", "the base left out", lambda x, W, A, B, scale: scale * x @ A @ B),
    _wrong("apply", "scale squared", lambda x, W, A, B, scale: x @ W + scale**2 * x @ A @ B),
    _wrong("apply", "the base twice", lambda x, W, A, B, scale: 2 * x @ W + scale * x @ A @ B),
    _wrong("apply", "the low-rank path subtracted", lambda x, W, A, B, scale: x @ W - scale * x @ A @ B),
    _wrong(
        "apply", "the first row for all",
        lambda x, W, A, B, scale: x @ W + scale * (x[:1] if x.ndim > 1 else x) @ A @ B,
    ),
    _wrong(
        "apply", "A read in the other memory order",
        lambda x, W, A, B, scale: x @ W + scale * x @ _same_bytes(A).T @ B,
    ),
    _wrong("merge", "subtracted", lambda W, A, B, scale: W - scale * A @ B),
    _wrong("merge", "transposed where square", lambda W, A, B, scale: W + scale * ((A @ B).T if _square(W) else A @ B)),
    _wrong("merge", "scaled twice", lambda W, A, B, scale: W + scale**2 * A @ B),
    _wrong("merge", "scale on the base", lambda W, A, B, scale: scale * (W + A @ B)),
    _wrong(
        "merge", "the sum rounded to bfloat16", lambda W, A, B, scale: _bfloat16(W + scale * A @ B), precision=True
    ),
    _wrong("unmerge", "added", lambda W, A, B, scale: W + scale * A @ B),
    _wrong("unmerge", "not scaled", lambda W, A, B, scale: W - A @ B),
    _wrong(
        "merge_symmetric", "the start left out", lambda W, A, B, A_0, B_0, scale: W + scale * A @ B
    ),
    _wrong(
        "merge_symmetric", "the start not scaled", lambda W, A, B, A_0, B_0, scale: W - A_0 @ B_0 + scale * A @ B
    ),
    _wrong(
        "merge_symmetric", "the product of the differences",
        lambda W, A, B, A_0, B_0, scale: W + scale * (A - A_0) @ (B - B_0),
    ),
    _wrong("gradients_dense", "no scale in dA", lambda G, A, B, scale: (G @ B.T, scale * A.T @ G)),
    _wrong("gradients_dense", "no scale in dB", lambda G, A, B, scale: (scale * G @ B.T, A.T @ G)),
    _wrong("gradients_dense", "scale squared", lambda G, A, B, scale: (scale**2 * G @ B.T, scale**2 * A.T @ G)),
    _wrong("gradients_dense", "the sign of descent", lambda G, A, B, scale: (-scale * G @ B.T, -scale * A.T @ G)),
    _wrong(
        "gradients_dense", "G transposed where square",
        lambda G, A, B, scale: lora.gradients_dense(G.T if _square(G) else G, A, B, scale=scale),
    ),
    _wrong("gradients_factored", "the mean over rows", lambda **arguments: _factored(**arguments, mean=True)),
    _wrong("gradients_factored", "the last row only", lambda **arguments: _factored(**arguments, last=True)),
    _wrong(
        "gradients_factored", "the last of the leading axes only",
        lambda x, dy, A, B, scale: _factored(_first(x), _first(dy), A, B, scale),
    ),
    _wrong(
        "gradients_factored", "no scale", lambda x, dy, A, B, scale: _factored(x, dy, A, B, 1.0)
    ),
    _wrong("gradient_input", "the low-rank path left out", lambda dy, W, A, B, scale: dy @ W.T),
    _wrong("gradient_input", "the base left out", lambda dy, W, A, B, scale: scale * dy @ B.T @ A.T),
    _wrong("gradient_input", "not scaled", lambda dy, W, A, B, scale: dy @ W.T + dy @ B.T @ A.T),
    _wrong(
        "gradient_input", "W not transposed where square",
        lambda dy, W, A, B, scale: dy @ (W if _square(W) else W.T) + scale * dy @ B.T @ A.T,
    ),
    _wrong(
        "update", "the first order only",
        lambda A, B, A_new, B_new, scale: scale * ((A_new - A) @ B + A @ (B_new - B)),
    ),
    _wrong(
        "update", "the product of the moves", lambda A, B, A_new, B_new, scale: scale * (A_new - A) @ (B_new - B)
    ),
    _wrong("update", "old minus new", lambda A, B, A_new, B_new, scale: scale * (A @ B - A_new @ B_new)),
    _wrong("update", "scale squared", lambda A, B, A_new, B_new, scale: scale**2 * (A_new @ B_new - A @ B)),
    _wrong("sgd", "the new A in the gradient of B", _sequential),
    _wrong(
        "sgd", "ascent",
        lambda A, B, G, scale, learning_rate: lora.sgd(A, B, -G, scale=scale, learning_rate=learning_rate),
    ),
    _wrong(
        "sgd", "no scale in the gradient",
        lambda A, B, G, scale, learning_rate: lora.sgd(A, B, G, scale=1.0, learning_rate=learning_rate),
    ),
    _wrong(
        "sgd", "A frozen", lambda A, B, G, scale, learning_rate: (A, B - learning_rate * scale * A.T @ G)
    ),
    _wrong(
        "sgd_update", "the first order only",
        lambda A, B, G, scale, learning_rate: -learning_rate * scale**2 * (G @ B.T @ B + A @ A.T @ G),
    ),
    _wrong(
        "sgd_update", "the second order with the sign of the first",
        lambda A, B, G, scale, learning_rate: -learning_rate * scale**2 * (G @ B.T @ B + A @ A.T @ G)
        - learning_rate**2 * scale**3 * G @ B.T @ A.T @ G,
    ),
    _wrong(
        "sgd_update", "scale once in the first order",
        lambda A, B, G, scale, learning_rate: -learning_rate * scale * (G @ B.T @ B + A @ A.T @ G)
        + learning_rate**2 * scale**3 * G @ B.T @ A.T @ G,
    ),
    _wrong(
        "sgd_update", "scale squared in the second order",
        lambda A, B, G, scale, learning_rate: -learning_rate * scale**2 * (G @ B.T @ B + A @ A.T @ G)
        + learning_rate**2 * scale**2 * G @ B.T @ A.T @ G,
    ),
    _wrong(
        "sgd_update", "learning_rate once in the second order",
        lambda A, B, G, scale, learning_rate: -learning_rate * scale**2 * (G @ B.T @ B + A @ A.T @ G)
        + learning_rate * scale**3 * G @ B.T @ A.T @ G,
    ),
    _wrong(
        "sgd_update", "the gradient of full training",
        lambda A, B, G, scale, learning_rate: -learning_rate * G,
    ),
    _wrong(
        "sgd_frozen", "not scaled", lambda A, B, G, scale, learning_rate: B - learning_rate * A.T @ G
    ),
    _wrong(
        "sgd_frozen", "ascent", lambda A, B, G, scale, learning_rate: B + learning_rate * scale * A.T @ G
    ),
    _wrong(
        "sgd_frozen", "the moved A",
        lambda A, B, G, scale, learning_rate: _sequential(A, B, G, scale, learning_rate)[1],
    ),
    _wrong(
        "sgd_frozen_update", "scale once",
        lambda A, G, scale, learning_rate: -learning_rate * scale * A @ A.T @ G,
    ),
    _wrong(
        "sgd_frozen_update", "an orthogonal projection of the gradient",
        lambda A, G, scale, learning_rate: -learning_rate * scale**2 * A @ np.linalg.pinv(A) @ G,
    ),
    _wrong(
        "random_projection_update", "the sum over columns, not the mean",
        lambda G, A, B, learning_rate: -learning_rate * (A @ A.T @ G + G @ B.T @ B),
    ),
    _wrong(
        "random_projection_update", "one side only",
        lambda G, A, B, learning_rate: -learning_rate / A.shape[1] * A @ A.T @ G,
    ),
    _wrong(
        "random_projection_update", "the mean of the two sides",
        lambda G, A, B, learning_rate: -learning_rate / A.shape[1] / 2 * (A @ A.T @ G + G @ B.T @ B),
    ),
    _wrong(
        "random_projection_update", "divided by the root of r",
        lambda G, A, B, learning_rate: -learning_rate / np.sqrt(A.shape[1]) * (A @ A.T @ G + G @ B.T @ B),
    ),
    _adam_wrong("decay through the gradient (Adam)", coupled=True),
    _adam_wrong("no correction of m", correct_1=False),
    _adam_wrong("no correction of v", correct_2=False),
    _adam_wrong("epsilon inside the root", inside=True),
    _adam_wrong("epsilon before the correction", early=True),
    _adam_wrong("decay without learning_rate", bare_decay=True),
    _adam_wrong("decay after the step", after=True),
    _adam_wrong("steps counted from 0", late=1),
    _adam_wrong("v of the magnitude, not of the square", absolute=True),
    _adam_wrong("Nesterov's mean", nesterov=True),
    _wrong("adamw", "the new A in the gradient of B", _adamw_sequential),
    _wrong("adamw", "AdamW on the dense gradient, then projected", _adamw_dense),
    _wrong("adamw", "no scale in the gradient", _adamw_unscaled),
    _wrong("adamw", "states start anew at every step", _adamw_fresh_states),
    _wrong("adamw", "A frozen", _adamw_only_B),
    _wrong("additive_delta", "blocks instead of residues", _blocks),
    _wrong("additive_delta", "B left out", lambda A, B: np.tile(A, B.shape[1] // A.shape[1]) + 0 * B[:1]),
    _wrong("additive_delta", "the product", lambda A, B: A @ B),
    _wrong("additive_gradients", "blocks instead of residues", _block_gradients),
    _wrong("additive_gradients", "means instead of sums", _mean_gradients),
    _wrong(
        "additive_update", "blocks instead of residues",
        lambda G, r, learning_rate: -learning_rate * _blocks(*_block_gradients(G, r)),
    ),
    _wrong("additive_update", "full training", lambda G, r, learning_rate: -learning_rate * G),
    _wrong(
        "from_peft", "the other memory order",
        lambda W_t, lora_A, lora_B: (_same_bytes(W_t), _same_bytes(lora_A), _same_bytes(lora_B)),
    ),
    _wrong(
        "from_peft", "a square weight kept as it is",
        lambda W_t, lora_A, lora_B: (W_t if _square(W_t) else W_t.T, lora_A.T, lora_B.T),
    ),
    _wrong("from_peft", "the roles of A and B exchanged", lambda W_t, lora_A, lora_B: (W_t.T, lora_B.T, lora_A.T)),
    _wrong(
        "to_peft", "the other memory order", lambda W, A, B: (_same_bytes(W), _same_bytes(A), _same_bytes(B))
    ),
    _wrong(
        "to_peft", "a square weight kept as it is", lambda W, A, B: (W if _square(W) else W.T, A.T, B.T)
    ),
)  # fmt: skip

MUSEUM = (
    _wrong(
        "scale_rslora", "rank-stabilised adapters scaled by alpha / r", lambda alpha, r: alpha / r,
        "https://github.com/NVIDIA/TensorRT-LLM/issues/1668",
    ),
    _wrong(
        "scale_rslora", "use_rslora ignored: scale 1", lambda alpha, r: 1.0,
        "https://github.com/paiml/aprender/pull/2189",
    ),
    _wrong("scale_lora", "alpha not divided by r", lambda alpha, r: alpha, "https://github.com/Blaizzy/mlx-vlm/pull/986"),
    _wrong(
        "scale_lora", "alpha ignored: scale 1", lambda alpha, r: 1.0,
        "https://github.com/adapter-hub/adapters/pull/770",
    ),
    _wrong(
        "apply", "scale 1 whatever alpha is", lambda x, W, A, B, scale: x @ W + x @ A @ B,
        "https://github.com/adapter-hub/adapters/pull/770",
    ),
    _wrong(
        "apply", "scale 0: the adapter loads and does nothing", lambda x, W, A, B, scale: x @ W,
        "https://github.com/invergent-ai/surogate/issues/173",
    ),
    _wrong(
        "delta", "alpha ignored when adapters are merged", lambda A, B, scale: A @ B,
        "https://github.com/cloneofsimo/lora/issues/187",
    ),
    _wrong(
        "merge", "alpha / r left out of the merge", lambda W, A, B, scale: W + A @ B,
        "https://github.com/hao-ai-lab/FastVideo/pull/870",
    ),
    _wrong(
        "merge", "merged twice", lambda W, A, B, scale: W + 2 * scale * A @ B,
        "https://github.com/huggingface/peft/pull/1355",
    ),
    _wrong(
        "merge", "the 4-bit grid of the weight swallows a weak adapter",
        lambda W, A, B, scale: _round_half_bytes(W + scale * A @ B), "https://github.com/ARahim3/mlx-tune/issues/15",
    ),
    _wrong(
        "merge", "factors restarted without merging them", lambda W, A, B, scale: W,
        "https://github.com/MakazhanAlpamys/Soup/issues/693",
    ),
    _wrong(
        "unmerge", "the snapshot of the base aliases the merged weight", lambda W, A, B, scale: W,
        "https://github.com/sgl-project/sglang/pull/18883",
    ),
    _wrong(
        "unmerge", "weights drift through a bfloat16 cycle", lambda W, A, B, scale: _bfloat16(W - scale * A @ B),
        "https://github.com/KohakuBlueleaf/LyCORIS/issues/264", precision=True,
    ),
    _wrong(
        "sgd_frozen_update", "the wrong side projected where the weight is square",
        lambda A, G, scale, learning_rate: -learning_rate * scale**2 * (G @ A @ A.T if _square(G) else A @ A.T @ G),
        "https://github.com/modelscope/ms-swift/pull/10146",
    ),
)  # fmt: skip
