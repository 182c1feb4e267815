"""The judge of norm: its reference against values by hand, its laws on right and wrong functions, its bounds."""

import numpy as np
import pytest

from conformance.budget import Profile
from conformance.case import Case, reference
from conformance.ops import norm as family
from conformance.vectors import build
from conformance.verdict import check_law, judge
from refimpl.ops import norm

FLOAT64 = Profile("float64", "strict", "A64")
RIGHT = {
    "norm.rms_norm": norm.rms_norm,
    "norm.rms_norm_scaled": norm.rms_norm_scaled,
    "norm.layer_norm": norm.layer_norm,
}
X = np.array([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])


def _expected(op: str, **arguments) -> np.ndarray:
    return reference(Case(op, "by-hand", arguments), digits=True)["y"].value


def test_reference_by_hand() -> None:
    # Mean squares 25/4 and 0; epsilon 11/4 turns the first root into 3.
    np.testing.assert_array_equal(_expected("norm.rms_norm", x=X, epsilon=2.75)[0], [1, 4 / 3, 0, 0])
    np.testing.assert_array_equal(_expected("norm.rms_norm", x=X, epsilon=0.0), [[1.2, 1.6, 0, 0], [0, 0, 0, 0]])
    scale = np.array([2.0, 3.0, 5.0, 7.0])
    np.testing.assert_array_equal(_expected("norm.rms_norm_scaled", x=X, scale=scale, epsilon=2.75)[0], [2, 4, 0, 0])
    # Mean 3, centred -2, -1, 0, 3, variance 14/4; epsilon 1/2 turns the root into 2. A constant row gives bias.
    x, bias = np.array([[1.0, 2.0, 3.0, 6.0], [5.0] * 4]), np.array([0.0, 0.25, 0.5, 1.0])
    out = _expected("norm.layer_norm", x=x, scale=scale, bias=bias, epsilon=0.5)
    np.testing.assert_array_equal(out, [[-2, -1.25, 0.5, 11.5], bias])
    np.testing.assert_array_equal(_expected("norm.layer_norm", x=x, scale=scale, bias=bias, epsilon=0.0)[1], bias)


@pytest.mark.parametrize(
    ("law", "op", "bug"),
    [
        ("spike", "norm.rms_norm", "epsilon outside the root"),
        ("spike", "norm.layer_norm", "unbiased variance, divided by d - 1"),
        ("unit_scale_is_plain", "norm.rms_norm", "divided by d - 1"),
        ("unit_scale_is_plain", "norm.rms_norm_scaled", "row centred first"),
        ("positive_scale", "norm.rms_norm", "epsilon fixed at 1e-7"),
        ("common_offset", "norm.layer_norm", "not centred"),
        ("epsilon_scales_as_a_square", "norm.rms_norm", "epsilon squared"),
        ("linear_in_scale", "norm.rms_norm_scaled", "scale + 1"),
        ("rows_without_spread", "norm.rms_norm", "0/0 for a row of zeros"),
        ("rows_without_spread", "norm.layer_norm", "0/0 for a constant row"),
        ("ramp_far_from_zero", "norm.layer_norm", "variance in one pass, mean of squares minus square of mean"),
        ("features_permute", "norm.rms_norm", "last feature left out of the mean"),
        ("rows_are_independent", "norm.rms_norm", "mean over the whole array"),
    ],
)
def test_laws_hold_and_fail(law: str, op: str, bug: str) -> None:
    chosen = next(entry for entry in family.LAWS if entry.name == law and op in entry.operators)
    wrong = next(m for m in (*family.MUTANTS, *family.MUSEUM) if (m.op, m.bug) == (op, bug))
    assert check_law("right", RIGHT[op], chosen, op, FLOAT64, 10).outcome == "pass"
    with np.errstate(all="ignore"):
        assert check_law("wrong", wrong.call, chosen, op, FLOAT64, 10).outcome == "logic"


@pytest.mark.parametrize("mutant", [*family.MUTANTS, *family.MUSEUM], ids=lambda m: f"{m.op}: {m.bug}")
def test_every_mutant_dies_by_a_vector(mutant) -> None:
    with np.errstate(all="ignore"):
        verdicts = [judge("wrong", mutant.call, build(c), FLOAT64) for c in family.CASES if c.op == mutant.op]
    assert any(v.outcome in ("logic", "precision") for v in verdicts)


def test_bounds_hold_what_float32_does_and_no_more() -> None:
    case = next(c for c in family.CASES if c.id == "norm.layer_norm/dense")
    vector, x = build(case), case["x"].astype(np.float32)
    scale, bias = case["scale"].astype(np.float32), case["bias"].astype(np.float32)
    centred = x - x.mean(axis=-1, keepdims=True, dtype=np.float32)
    root = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(case["epsilon"]))
    error = np.abs((centred / root * scale + bias).astype(np.float64) - vector.expected["y"])
    assert 0.005 < (error / vector.bounds["float32-strict"]["y"]).max() <= 1
    # An error in the fourth decimal is far outside.
    assert (vector.bounds["float32-strict"]["y"] < 2e-5).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_rounding_to_16_bits_nearly_fills_the_bound(dtype: str) -> None:
    worst = 0.0
    for case in family.CASES:
        if case.op == "norm.rms_norm" and dtype in case.dtypes and not case.exact:
            verdict = judge("right", _stored(norm.rms_norm, dtype), build(case), Profile(dtype))
            assert verdict.outcome == "pass", verdict.message
            worst = max(worst, verdict.ratio)
    assert 0.2 < worst <= 1


def _stored(function, dtype: str):
    from conformance.case import storage_type

    def rounded(**arguments):
        wide = {k: v.astype(np.float64) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
        return function(**wide).astype(storage_type(dtype))

    return rounded
