"""The judge of can: its references against values by hand, its laws on right and wrong functions, its bounds."""

import numpy as np
import pytest

from conformance.budget import Profile
from conformance.case import Case, reference
from conformance.ops import can as family
from conformance.vectors import build
from conformance.verdict import check_law, judge
from refimpl.ops import can

FLOAT64 = Profile("float64", "strict", "A64")
LN = np.log
BY_HAND = {
    "confident": np.array([[0.75, 0.25]]),
    "uncertain": np.array([[0.5, 0.5]]),
    "prior": np.array([0.25, 0.75]),
}


def _expected(op: str, **arguments) -> np.ndarray:
    balls = reference(Case(f"can.{op}", "by-hand", arguments), digits=True)
    return next(iter(balls.values())).value


def test_entropies_by_hand() -> None:
    p = np.array([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0, 0, 0], [0, 0, 0, 0]])
    expected = [1.5 * LN(2) / LN(3), 1, 0, 1]
    np.testing.assert_allclose(_expected("top_entropy", p=p, top=3), expected, rtol=1e-15)
    expected = [0.75, 0.75, 0, 0]
    np.testing.assert_allclose(_expected("top_entropy_unnormalized", p=p, top=3), expected, rtol=1e-15)
    # Two classes, top 3: clamped.
    np.testing.assert_array_equal(_expected("top_entropy", p=np.array([[0.5, 0.5]]), top=3), [1.0])
    # (80, 16, 16, 16): 0.65, 0.72, 0.77 for two, three and four.
    p = np.array([[80.0, 16, 16, 16]]) / 128
    for top, reached in ((2, 0), (3, 0), (4, 1), (7, 1)):
        np.testing.assert_array_equal(_expected("ambiguous_any", p=p, threshold=0.75, max_top=top), [reached])


def test_prior_by_hand() -> None:
    labels = np.array([0, 2, 2, 2])
    np.testing.assert_array_equal(
        _expected("class_prior", labels=labels, classes=4, smoothing=1.0), [0.25, 0.125, 0.5, 0.125]
    )


@pytest.mark.parametrize("form", ["alternating_normalization_loop", "alternating_normalization"])
def test_normalization_by_hand(form: str) -> None:
    # Columns 5/4 and 3/4: b becomes (1/10, 1/2), then (1, 5) / 6.
    y = _expected(form, **BY_HAND, alpha=1.0, iterations=1)
    np.testing.assert_allclose(y, [[1 / 6, 5 / 6]], rtol=1e-15)
    # The second round: C = (3, 5) / 8, columns 13/24 and 35/24; b = (1/13, 3/7), 7 and 39 parts of 46.
    y = _expected(form, **BY_HAND, alpha=1.0, iterations=2)
    np.testing.assert_allclose(y, [[7 / 46, 39 / 46]], rtol=1e-15)
    # Squares: columns 13/16 and 5/16, b (4/13, 4/5) with an even prior.
    y = _expected(form, **(BY_HAND | {"prior": np.array([1.0, 1.0])}), alpha=2.0, iterations=1)
    np.testing.assert_allclose(y, [[5 / 18, 13 / 18]], rtol=1e-15)
    # Nothing in common with the prior, and no rounds.
    apart = BY_HAND | {"uncertain": np.array([[0.5, 0.0]]), "prior": np.array([0.0, 1.0])}
    np.testing.assert_array_equal(_expected(form, **apart, alpha=1.0, iterations=3), [[0.5, 0.0]])
    np.testing.assert_array_equal(_expected(form, **BY_HAND, alpha=1.0, iterations=0), [[0.5, 0.5]])


def test_official_by_hand() -> None:
    # b_j = 1e-10 without confident rows: half of the prior is left, and of that all but 1e-10.
    b = np.array([[1e-10, 0.0]])
    y = _expected(
        "alternating_normalization_official",
        confident=np.zeros((0, 2)), uncertain=b, prior=np.array([1e-10, 1.0]), alpha=1.0, iterations=1,
    )  # fmt: skip
    np.testing.assert_allclose(y, [[1 / 3, 0]], rtol=1e-15)


def test_adjust_by_hand() -> None:
    # The first row is the only uncertain one: columns 3/2 and 1/2 + 1, so (1/3, 1/3) before the prior.
    arguments = {"p": np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]), "prior": np.array([0.25, 0.75])}
    case = Case("can.adjust", "by-hand", arguments | {"top": 3, "threshold": 0.9, "alpha": 1.0, "iterations": 1})
    balls = reference(case, digits=True)
    np.testing.assert_allclose(balls["probabilities"].value, [[0.25, 0.75], [1, 0], [0, 1]], rtol=1e-15)
    np.testing.assert_array_equal(balls["uncertain"].value, [1, 0, 0])


@pytest.mark.parametrize(
    ("law", "function", "bug"),
    [
        ("no_confident_rows_give_the_prior", "alternating_normalization", "the prior is left out"),
        ("alpha_is_a_power", "alternating_normalization_loop", "the power is 1 / alpha"),
        (
            "rounds_compose",
            "alternating_normalization",
            "the one-round formula iterated with the column sums of the first",
        ),
        ("fixed_point", "alternating_normalization", "column sums leave out b"),
        (
            "uncertain_rows_do_not_see_each_other",
            "alternating_normalization_loop",
            "all uncertain rows are normalised jointly",
        ),
        (
            "unseen_class_takes_all",
            "alternating_normalization",
            "1e-10 is added: an unseen class loses a tiny b_j",
        ),
        ("two_equal_leaders", "top_entropy", "divided by ln k"),
        ("any_top_decides", "ambiguous_any", "upper end excluded"),
        ("label_by_label", "class_prior", "smoothing not counted in the divisor"),
        ("both_epsilons", "alternating_normalization_official", "no epsilon in the rows"),
        ("confident_rows_stay", "adjust", "confident rows are normalised too"),
        ("certain_rows_are_the_reference", "adjust", "the row itself is in the reference"),
    ],
)
def test_laws_hold_and_fail(law: str, function: str, bug: str) -> None:
    op = f"can.{function}"
    chosen = next(entry for entry in family.LAWS if entry.name == law and op in entry.operators)
    wrong = next(m for m in (*family.MUTANTS, *family.MUSEUM) if (m.op, m.bug) == (op, bug))
    assert check_law("right", getattr(can, function), chosen, op, FLOAT64, 10).outcome == "pass"
    with np.errstate(all="ignore"):
        assert check_law("wrong", wrong.call, chosen, op, FLOAT64, 100).outcome == "logic"


def test_every_mutant_dies_by_a_vector() -> None:
    vectors = [build(c) for c in family.CASES]
    for mutant in (*family.MUTANTS, *family.MUSEUM):
        with np.errstate(all="ignore"):
            verdicts = [judge("wrong", mutant.call, v, FLOAT64) for v in vectors if v.case.op == mutant.op]
        assert any(v.outcome in ("logic", "precision") for v in verdicts), mutant.bug


def _narrow_loop(confident, uncertain, prior, alpha, iterations):
    """float32 throughout, the prior first and each sum backwards: another order than the specification's."""
    results = []
    for b in uncertain:
        y = np.concatenate([confident, b[None]]).astype(np.float32)
        for _ in range(iterations):
            y = np.exp(np.float32(alpha) * np.log(y))
            y = y * prior.astype(np.float32) / y[::-1].sum(0)
            y = y / y[:, ::-1].sum(1, keepdims=True)
        results.append(y[-1])
    return np.array(results)


@pytest.mark.parametrize("name", ["one-round", "two-rounds", "three-rounds-alpha-2", "eight-rounds"])
def test_bounds_hold_what_float32_does_and_no_more(name: str) -> None:
    case = next(c for c in family.CASES if c.id == f"can.alternating_normalization/{name}")
    vector = build(case)
    error = np.abs(_narrow_loop(**case.arguments).astype(np.float64) - vector.expected["y"])
    assert 0.001 < (error / vector.bounds["float32-strict"]["y"]).max() <= 1
    # An error in the third decimal is far outside.
    assert (1e-3 * vector.expected["y"] > vector.bounds["float32-strict"]["y"]).all()


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_a_final_rounding_alone_uses_the_16_bit_bound(storage: str) -> None:
    ratios = []
    for case in family.CASES:
        if case.op == "can.alternating_normalization" and storage in case.dtypes and not case.exact:
            verdict = judge("right", can.alternating_normalization, build(case), Profile(storage))
            assert verdict.outcome == "pass", verdict.message
            ratios.append(verdict.ratio)
    rounded = [
        judge(
            "rounded",
            lambda **arguments: can.alternating_normalization(**arguments).astype(_storage(storage)),
            build(case),
            Profile(storage),
        ).ratio
        for case in family.CASES
        if case.op == "can.alternating_normalization" and storage in case.dtypes and not case.exact
    ]
    assert 0.2 < max(rounded) <= 1
    assert max(ratios) < 0.01


def _storage(name: str) -> np.dtype:
    from conformance.case import storage_type

    return storage_type(name)
