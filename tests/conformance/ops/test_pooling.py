"""The judge of pooling: its reference against values by hand, its laws on right and wrong functions, its bounds."""

import numpy as np
import pytest

from conformance.budget import Profile
from conformance.case import Case, reference, storage_type
from conformance.ops import pooling as family
from conformance.vectors import build
from conformance.verdict import check_law, judge
from refimpl.ops import pooling

FLOAT64 = Profile("float64", "strict", "A64")


def _expected(name: str, **arguments) -> np.ndarray:
    return reference(Case(f"pooling.{name}", "by-hand", arguments), digits=True)["y"].value


def test_reference_by_hand() -> None:
    x = np.array([[[1.0, 10.0], [3.0, 30.0], [1e6, -1e6]], [[5.0, 5.0], [7.0, 7.0], [9.0, 9.0]]])
    mask = np.array([[True, True, False], [False, False, False]])
    assert _expected("first", x=x).tolist() == [[1.0, 10.0], [5.0, 5.0]]
    assert _expected("masked_mean", x=x, mask=mask).tolist() == [[2.0, 20.0], [0.0, 0.0]]
    average = _expected("first_last_average", first=x, last=3 * x, mask=mask)
    assert average.tolist() == [[4.0, 40.0], [0.0, 0.0]]
    kernel, bias = np.array([[1.0, 0.0, 2.0], [0.0, 0.125, -0.25]]), np.array([0.5, 0.0, 0.25])
    assert _expected("pooler_linear", x=x, kernel=kernel, bias=bias)[0].tolist() == [1.5, 1.25, -0.25]
    out = _expected("pooler_tanh", x=x, kernel=kernel, bias=bias)[0]
    np.testing.assert_allclose(out, [0.9051482536448664, 0.8482836399575129, -0.24491866240370913], rtol=1e-15)


@pytest.mark.parametrize(
    ("law", "op", "bug"),
    [
        ("impulse", "pooling.masked_mean", "count plus one"),
        ("impulse", "pooling.first_last_average", "sum of both means"),
        ("constant_tokens", "pooling.masked_mean", "0/0 without a visible token"),
        ("masked_content", "pooling.masked_mean", "mean over the padding too"),
        ("padding", "pooling.masked_mean", "masked sum divided by the length of the array"),
        ("tokens_permute", "pooling.masked_mean", "position 0 left out"),
        ("blocks_exchange", "pooling.first_last_average", "last block only"),
        ("later_tokens", "pooling.first", "mean of all tokens"),
        ("later_tokens", "pooling.pooler_linear", "last position"),
        ("first_token_comes_back", "pooling.first", "tanh of position 0"),
        ("one_hot_kernel", "pooling.pooler_tanh", "tanh left out"),
    ],
)
def test_laws_hold_and_fail(law: str, op: str, bug: str) -> None:
    chosen = next(entry for entry in family.LAWS if entry.name == law and op in entry.operators)
    wrong = next(m for m in (*family.MUTANTS, *family.MUSEUM) if (m.op, m.bug) == (op, bug))
    right = getattr(pooling, op.split(".")[1])
    assert check_law("right", right, chosen, op, FLOAT64, 10).outcome == "pass"
    with np.errstate(all="ignore"):
        assert check_law("wrong", wrong.call, chosen, op, FLOAT64, 10).outcome == "logic"


@pytest.mark.parametrize("mutant", [*family.MUTANTS, *family.MUSEUM], ids=lambda m: f"{m.op}: {m.bug}")
def test_every_mutant_dies_by_a_vector(mutant) -> None:
    with np.errstate(all="ignore"):
        verdicts = [judge("wrong", mutant.call, build(c), FLOAT64) for c in family.CASES if c.op == mutant.op]
    assert any(v.outcome in ("logic", "precision") for v in verdicts)


def test_a_sum_wrong_by_a_thousandth_dies_of_the_cancellation_in_every_format() -> None:
    case = next(c for c in family.CASES if c.id == "pooling.masked_mean/exact-cancellation")
    assert case.dtypes == ("float64", "float32", "float16", "bfloat16")
    vector = build(case)
    for dtype in case.dtypes:

        def mean(x, mask, early: float, dtype: str = dtype) -> np.ndarray:
            x = x.astype(np.float64)
            total = early * x[:, :-1].sum(axis=1) + x[:, -1]
            return (total / mask.sum(axis=-1, keepdims=True)).astype(storage_type(dtype))

        right = judge("right", lambda x, mask: mean(x, mask, 1.0), vector, Profile(dtype))
        wrong = judge("wrong", lambda x, mask: mean(x, mask, 0.999), vector, Profile(dtype))
        assert (right.outcome, wrong.failed) == ("pass", True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_honest_results_stay_within_bounds_that_mean_something(dtype: str) -> None:
    worst = 0.0
    for case in family.CASES:
        if dtype in case.dtypes:
            verdict = judge(
                "right", _in_float32(getattr(pooling, case.op.split(".")[1]), dtype), build(case), Profile(dtype)
            )
            assert verdict.outcome == "pass", (case.id, verdict.message)
            worst = max(worst, 0.0 if case.exact else verdict.ratio)
    assert (0.01 if dtype == "float32" else 0.2) < worst <= 1


def _in_float32(function, dtype: str):
    def rounded(**arguments):
        wide = {k: v if v.dtype == bool else v.astype(np.float64) for k, v in arguments.items()}
        return function(**wide).astype(storage_type(dtype))

    return rounded
