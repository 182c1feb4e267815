"""Judging activation: relu, silu, both forms of gelu, and the feature map elu + 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.budget import LIBM, MP, Arithmetic, Ball, Profile, erf, exp, sqrt, tanh, where
from conformance.budget import relu as relu_ball
from conformance.budget import silu as silu_ball
from conformance.case import Case, Function, Operator
from conformance.generate import Draw, drawn
from conformance.law import Law, close, equal, run
from conformance.mutant import Mutant
from refimpl.ops import activation

RELU, SILU, ERF, TANH, ELU = (
    f"activation.{name}" for name in ("relu", "silu", "gelu_erf", "gelu_tanh", "elu_plus_one")
)
ALL = (RELU, SILU, ERF, TANH, ELU)


def relu(a: Arithmetic, x: Ball) -> Ball:
    """max(x, 0)."""
    return relu_ball(x)


def silu(a: Arithmetic, x: Ball) -> Ball:
    """x / (1 + exp(-x))."""
    return silu_ball(x)


def gelu_erf(a: Arithmetic, x: Ball) -> Ball:
    """x (1 + erf(x / sqrt 2)) / 2: the cancelling form, so that it is permitted."""
    made = erf(x / sqrt(a.exact(2.0)))
    # Where 1 is added, an erf that is good to a few units of 1, not of itself, serves as well.
    return 0.5 * x * (1.0 + a.ball(made.mid, made.rad + LIBM * a.unit * (1 - np.abs(made.value))))


def gelu_tanh(a: Arithmetic, x: Ball) -> Ball:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    pi = a.exact(np.asarray(+MP.pi, dtype=object) if a.digits else math.pi)
    inner = sqrt(2.0 / pi) * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + tanh(inner))


def elu_plus_one(a: Arithmetic, x: Ball) -> Ball:
    """x + 1 above 0, exp(x) below; (exp(x) - 1) + 1 is permitted."""
    below = where(x.value > 0, 0.0, x)
    return where(x.value > 0, x + 1.0, (exp(below) - 1.0) + 1.0)


OPERATORS = tuple(
    Operator(f"activation.{f.__name__}", getattr(activation, f.__name__), f)
    for f in (relu, silu, gelu_erf, gelu_tanh, elu_plus_one)
)


WIDE = ("float64", "float32", "bfloat16")


def _cases(name: str, make: Callable[[Draw], np.ndarray], clauses: dict[str, str], **options: Any) -> list[Case]:
    """One case for each operator in `clauses`, on numbers of its own."""
    return [
        Case(op, name, {"x": make(Draw(f"{op}/{name}"))}, tuple(labels.split()), exact=op == RELU, **options)
        for op, labels in clauses.items()
    ]


def _fixed(op: str, name: str, clauses: str, values: list[float], **options: Any) -> Case:
    return Case(op, name, {"x": np.array(values)}, tuple(clauses.split()), exact=op == RELU, **options)


_EVERY = {RELU: "C1", SILU: "C1", ERF: "C1", TANH: "C1", ELU: "C1 C2"}

CASES = (
    *_cases("grid", lambda draw: draw.grid(2, 5, 7), _EVERY),
    *_cases("wide", lambda draw: draw.grid(7, 11, exponent=-4), _EVERY),
    *_cases("small", lambda draw: draw.grid(3, 7, exponent=-9), _EVERY),
    *_cases("near-one", lambda draw: draw.grid(2, 3, 5, low=32, high=96), _EVERY),
    *_cases("dense", lambda draw: draw.dense(5, 11, exponent=2), _EVERY),
    *_cases("dense-53-bits", lambda draw: draw.dense(23, bits=53, exponent=2), _EVERY),
    # Where gelu's two forms are furthest apart.
    _fixed(ERF, "two-forms-apart", "C2", [-3.0, -2.75, -2.703125, -2.5, -2.0, 2.0, 2.5, 2.703125, 2.75, 3.0]),
    _fixed(TANH, "two-forms-apart", "C2", [3.0, 2.75, 2.703125, 2.5, -2.0, -2.5, -2.703125, -2.75, -3.0]),
    # The negative tail of silu, where a form by tanh has lost every digit.
    _fixed(SILU, "tail", "C2", [float(-x) for x in range(8, 33)], only=WIDE),
    _fixed(ELU, "tail", "C2", [-10.0, -8.0, -5.0, -3.0, -2.0, -1.0, -0.5, -0.125]),
    _fixed(ELU, "around-zero", "C1 C2", [-0.5, -0.125, 0.0, 0.125, 0.5, 1.0]),
    _fixed(RELU, "around-zero", "C1", [0.5, -0.125, 0.0, 0.125, -0.5, -1.0, 2.0]),
    _fixed(SILU, "saturated", "C3", [-1000.0, -200.0, 20.0, 200.0, 1000.0]),
    _fixed(TANH, "saturated", "C3", [1000.0, 200.0, 20.0, -200.0, -1000.0, 7.0], only=WIDE),
)


# Laws.
def reflection(implementation: Function, case: Case) -> None:
    """f(x) - f(-x) = x."""
    x = case["x"]
    one, two = run(implementation, case)[0], run(implementation, case, x=-x)[0]
    close("reflection", case, one.value - two.value, x, one.radius + two.radius + 2.0**-52 * np.abs(x))


def odds(implementation: Function, case: Case) -> None:
    """The gate is a logistic function: f(x) = -exp(z) f(-x), z = x for silu, 2 sqrt(2 / pi) (x + 0.044715 x^3)."""
    x = -np.abs(case["x"])
    z = x if case.op == SILU else 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    one, two = run(implementation, case, x=x)[0], run(implementation, case, x=-x)[0]
    factor = np.exp(z)
    slack = one.radius + factor * (two.radius + 2.0**-50 * (1 + np.abs(z)) * np.abs(x))
    close("odds", case, one.value, -factor * two.value, slack)


def taylor_series(implementation: Function, case: Case) -> None:
    """f(x) / x - 1/2 is the odd series x^(2k+1) / (1 3 5 ... (2k+1)) times the normal density, for abs(x) <= 3."""
    x = np.clip(case["x"], -3, 3)
    term, total = x.copy(), x.copy()
    for k in range(1, 60):
        term = term * x**2 / (2 * k + 1)
        total = total + term
    expected = x * (0.5 + total * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi))
    out = run(implementation, case, x=x)[0]
    close("taylor_series", case, out.value, expected, out.radius + 2.0**-48 * np.abs(x))


def two_sided(implementation: Function, case: Case) -> None:
    """f(x) f(-x) = 0, both at least 0."""
    one, two = run(implementation, case)[0].value, run(implementation, case, x=-case["x"])[0].value
    equal("two_sided", case, one * two, np.zeros(one.shape))
    equal("two_sided", case, np.minimum(one, two), np.zeros(one.shape))


def exponential_below_zero(implementation: Function, case: Case) -> None:
    """f(2 x) = f(x)^2 for x <= 0, and f(-1) = 1 / e."""
    x = -np.abs(case["x"])
    one, two = run(implementation, case, x=x)[0], run(implementation, case, x=2 * x)[0]
    slack = two.radius + (2 * np.abs(one.value) + one.radius) * one.radius
    close("exponential_below_zero", case, two.value, one.value**2, slack)
    out = run(implementation, case, x=np.full(x.shape, -1.0))[0]
    close("exponential_below_zero", case, out.value, np.full(x.shape, 1 / math.e), out.radius)


def line_above_zero(implementation: Function, case: Case) -> None:
    """f(x) = x + 1 for x >= 0."""
    x = np.abs(case["x"])
    out = run(implementation, case, x=x)[0]
    close("line_above_zero", case, out.value, x + 1, out.radius)


def elementwise(implementation: Function, case: Case) -> None:
    """Changing one element leaves the others as they are, bit for bit."""
    changed = case["x"].copy()
    changed.flat[0] = 1 - 2 * changed.flat[0]
    one, two = run(implementation, case)[0].value.ravel(), run(implementation, case, x=changed)[0].value.ravel()
    equal("elementwise", case, two[1:], one[1:])


LAWS = (
    Law(reflection, (RELU, SILU, ERF, TANH), ("C1",)),
    Law(odds, (SILU, TANH), ("C2",)),
    Law(taylor_series, (ERF,), ("C2",)),
    Law(two_sided, (RELU,), ("C1",)),
    Law(exponential_below_zero, (ELU,), ("C2",)),
    Law(line_above_zero, (ELU,), ("C1",)),
    Law(elementwise, ALL),
)


def strategy(function: str, profile: Profile) -> st.SearchStrategy[Case]:
    """1 to 3 rows of up to 7 numbers, of magnitude up to 2^-4, 2 or 8."""

    def build(draw: Draw, rows: int, width: int, exponent: int) -> dict[str, Any]:
        return {"x": draw.grid(rows, width, exponent=exponent)}

    return drawn(
        f"activation.{function}",
        profile,
        build,
        rows=st.integers(1, 3),
        width=st.integers(1, 7),
        exponent=st.sampled_from([-4, -6, -11]),
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _tanh_form(
    x: np.ndarray, cubic: float = 0.044715, factor: float = math.sqrt(2 / math.pi), power: int = 3
) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(factor * (x + cubic * x**power)))


def _erf(x: np.ndarray) -> np.ndarray:
    from scipy.special import erf as by_scipy

    return np.asarray(by_scipy(x))


MUTANTS = (
    Mutant(RELU, "negative slope 0.01", lambda x: np.where(x > 0, x, 0.01 * x)),
    Mutant(RELU, "clipped at 6", lambda x: np.clip(x, 0, 6)),
    Mutant(RELU, "absolute value", lambda x: np.abs(x)),
    Mutant(RELU, "sign lost: min(x, 0)", lambda x: np.minimum(x, 0)),
    Mutant(RELU, "softplus", lambda x: np.log1p(np.exp(x))),
    Mutant(RELU, "squared", lambda x: np.maximum(x, 0) ** 2),
    Mutant(SILU, "logistic function without the factor x", _sigmoid),
    Mutant(SILU, "beta 1.702", lambda x: x * _sigmoid(1.702 * x)),
    Mutant(SILU, "piecewise linear (hard swish)", lambda x: x * np.clip(x + 3, 0, 6) / 6),
    Mutant(SILU, "sign of the exponent", lambda x: x * _sigmoid(-x)),
    Mutant(SILU, "gelu instead", lambda x: activation.gelu_erf(x)),
    Mutant(SILU, "tanh instead of the logistic function", lambda x: x * np.tanh(x)),
    Mutant(ERF, "argument not divided by sqrt(2)", lambda x: 0.5 * x * (1 + _erf(x))),
    Mutant(ERF, "silu instead", lambda x: x * _sigmoid(x)),
    Mutant(ERF, "factor 1/2 left out", lambda x: x * (1 + _erf(x / math.sqrt(2)))),
    Mutant(TANH, "erf form instead", lambda x: activation.gelu_erf(x)),
    Mutant(TANH, "cubic coefficient 0.0447", lambda x: _tanh_form(x, cubic=0.0447)),
    Mutant(TANH, "cubic coefficient 0.044175", lambda x: _tanh_form(x, cubic=0.044175)),
    Mutant(TANH, "factor 0.8 for sqrt(2 / pi)", lambda x: _tanh_form(x, factor=0.8)),
    Mutant(TANH, "square for the cube", lambda x: _tanh_form(x, power=2)),
    Mutant(TANH, "cubic term left out", lambda x: _tanh_form(x, cubic=0.0)),
    Mutant(ELU, "plus one left out", lambda x: activation.elu_plus_one(x) - 1),
    Mutant(ELU, "relu + 1", lambda x: np.maximum(x, 0) + 1),
    Mutant(ELU, "exp everywhere", lambda x: np.exp(x)),
    Mutant(ELU, "alpha 0.5", lambda x: np.where(x > 0, x + 1, 0.5 * np.expm1(np.minimum(x, 0)) + 1)),
    Mutant(ELU, "softplus", lambda x: np.log1p(np.exp(x))),
    Mutant(ELU, "clipped at 1", lambda x: np.exp(np.minimum(x, 0))),
)

MUSEUM = (
    Mutant(
        ERF,
        "tanh form instead of erf",
        _tanh_form,
        url="https://github.com/chelsea0x3b/dfdx/issues/804",
    ),
    Mutant(
        TANH,
        "factor x left out",
        lambda x: 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        url="https://github.com/tensorflow/tfjs/pull/8224",
    ),
    Mutant(
        ERF,
        "logistic approximation, x sigmoid(1.702 x)",
        lambda x: x * _sigmoid(1.702 * x),
        url="https://github.com/ROCm/AMDMIGraphX/issues/2542",
    ),
)
