"""Judging norm: root mean square and layer norms."""

from __future__ import annotations

from functools import partial

import numpy as np
from hypothesis import strategies as st

from conformance.budget import Arithmetic, Ball, Profile, sqrt
from conformance.case import Case, Function, Operator
from conformance.generate import Draw, drawn
from conformance.law import Law, close, equal, run
from conformance.mutant import Mutant
from refimpl.ops import norm


def rms_norm(a: Arithmetic, x: Ball, epsilon: float) -> Ball:
    """x / sqrt(mean(x^2) + epsilon); a row of zeros gives zeros."""
    return x / sqrt((x * x).mean(keepdims=True) + epsilon)


OPERATORS = (Operator("norm.rms_norm", norm.rms_norm, rms_norm),)


def _case(op: str, name: str, clauses: str, *, exact: bool = False, **arguments) -> Case:
    return Case(op, name, arguments, tuple(clauses.split()), exact)


_rms = partial(_case, "norm.rms_norm")

CASES = (
    _rms("grid", "C1", x=Draw("norm/grid").grid(2, 5, 7), epsilon=1e-12),
    _rms("dense", "C1", x=Draw("norm/dense").dense(3, 11), epsilon=1e-7),
    # Rows whose mean square is near epsilon: 1e-12, 1e-7 and 1e-5 part company here.
    _rms("near-epsilon", "C2", x=Draw("norm/small").grid(4, 8, exponent=-16), epsilon=1e-7),
    _rms("exact-power-of-two", "C1 C2", exact=True, x=np.array([[2.0, -2, 2, 2], [0.5, 0.5, -0.5, 0.5]]), epsilon=0.0),
)


# Laws.
def positive_scale(implementation: Function, case: Case) -> None:
    """N(2^k x) = N(x) when epsilon = 0."""
    one, two = run(implementation, case, epsilon=0.0), run(implementation, case, epsilon=0.0, x=8 * case["x"])
    close("positive_scale", case, two[0].value, one[0].value, one[0].radius + two[0].radius)


def rows_are_independent(implementation: Function, case: Case) -> None:
    """Changing one row leaves the others as they are, bit for bit."""
    changed = case["x"].copy()
    changed[0] = -2 * changed[0] + 1
    kept = run(implementation, case)[0].value[1:]
    equal("rows_are_independent", case, run(implementation, case, x=changed)[0].value[1:], kept)


LAWS = (
    Law(positive_scale, ("norm.rms_norm",), ("C3",)),
    Law(rows_are_independent, ("norm.rms_norm",)),
)


def strategy(function: str, profile: Profile) -> st.SearchStrategy[Case]:
    """Rows of 1 to 9 features; epsilon from 0 to 1e-5."""

    def build(draw: Draw, rows: int, width: int, epsilon: float) -> dict:
        return {"x": draw.grid(rows, width), "epsilon": epsilon}

    return drawn(
        f"norm.{function}", profile, build,
        rows=st.integers(1, 3), width=st.integers(1, 9), epsilon=st.sampled_from([1e-12, 1e-7, 1e-5]),
    )


def _epsilon_outside(x, epsilon):
    return x / (np.sqrt((x * x).mean(-1, keepdims=True)) + epsilon)


MUTANTS = (
    Mutant("norm.rms_norm", "sum of squares instead of the mean", lambda x, epsilon: x / np.sqrt((x * x).sum(-1, keepdims=True) + epsilon)),
    Mutant("norm.rms_norm", "epsilon outside the root", _epsilon_outside),
)

MUSEUM = ()
