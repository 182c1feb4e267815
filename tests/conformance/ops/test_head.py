"""The judge of head: its reference against values by hand, its laws on right and wrong functions, its bounds."""

from functools import cache

import numpy as np
import pytest

from conformance.budget import Profile
from conformance.case import Case, reference, storage_type
from conformance.ops import head as family
from conformance.vectors import Vector, build
from conformance.verdict import check_law, judge
from refimpl.ops import head

FLOAT64 = Profile("float64", "strict", "A64")
INF = np.inf


def _expected(name: str, **arguments) -> list[np.ndarray]:
    balls = reference(Case(f"head.{name}", "by-hand", arguments), digits=True)
    return [ball.value for ball in balls.values()]


@cache
def _vectors(op: str) -> tuple[Vector, ...]:
    return tuple(build(case) for case in family.CASES if case.op == op)


def test_reference_of_the_dense_heads_by_hand() -> None:
    kernel, bias = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]), np.array([0.5, 0.0, 0.25])
    assert _expected("classify", x=np.array([1.0, 2.0]), kernel=kernel, bias=bias)[0].tolist() == [1.5, 2.0, 0.25]
    x, mask = np.array([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]), np.array([True, True, False])
    out = _expected("choose", x=x, kernel=np.array([[10.0], [1.0]]), bias=np.array([0.5]), mask=mask)[0]
    assert out.tolist() == [12.5, 34.5, -INF]


def test_reference_of_the_pointers_by_hand() -> None:
    # Identity weights. Token 0 has q = (1, 0), k = (0, 1); token 1 has q = (0, 2), k = (3, 0) and stands at position 1.
    x, mask, positions = np.array([[1.0, 0, 0, 1], [0, 2, 3, 0]]), np.ones(2, bool), np.arange(2)
    shared = {"kernel": np.eye(4), "bias": np.zeros(4), "mask": mask, "positions": positions, "base": 1e4}
    out = _expected("global_pointer", x=x, heads=1, **shared)[0]
    np.testing.assert_allclose(out, [[[0, 3 * np.cos(1) / np.sqrt(2)], [-INF, 0]]], atol=1e-15)
    # The same q and k from alternate channels; type 0 takes 1 from every end, type 1 channel 0 of the start.
    alternate = x[:, [0, 2, 1, 3]]
    types = {"type_kernel": np.zeros((4, 4)), "type_bias": np.array([2.0, 0, 0, 0])}
    types["type_kernel"][0, 3] = 10.0
    out = _expected("efficient_global_pointer", x=alternate, **types, **shared)[0]
    dot = 3 * np.cos(1) / np.sqrt(2)
    np.testing.assert_allclose(out, [[[1, 1 + dot], [-INF, 1]], [[5, 5 + dot], [-INF, 0]]], atol=1e-15)


def test_reference_of_the_decoders_by_hand() -> None:
    scores = np.array([[[1.0, 8.0, 9.0], [7.0, 2.0, 0.0], [99.0, 99.0, 9.0]]])
    spans = _expected("decode_spans", scores=scores, threshold=1.0)[0]
    assert spans.tolist() == [[0, 0, 1], [0, 0, 2], [0, 1, 1], [0, 2, 2]]
    for max_length, expected in [(1, [2, 2, 9.0]), (2, [2, 2, 9.0]), (3, [0, 2, 9.0])]:
        assert [part.item() for part in _expected("best_span", scores=scores, max_length=max_length)] == expected
    nothing = _expected("best_span", scores=np.full((1, 2, 2), -INF), max_length=2)
    assert [part.item() for part in nothing] == [-1, -1, -INF]


@pytest.mark.parametrize(
    ("law", "op", "bug"),
    [
        ("one_hot_kernel", "head.classify", "softmax added"),
        ("one_hot_kernel", "head.choose", "masked choices score -1e12"),
        ("choices_exchange", "head.choose", "bias added to the first choice only"),
        ("masked_content", "head.choose", "mask ignored"),
        ("spans_that_can_be", "head.global_pointer", "padding masked at the end token only"),
        ("spans_that_can_be", "head.efficient_global_pointer", "-1e12 for -inf"),
        ("shifted_positions", "head.global_pointer", "query rotated, key not"),
        ("padding", "head.global_pointer", "divided by sqrt(n), the length of the array"),
        ("rotated_impulses", "head.global_pointer", "all queries, then all keys"),
        (
            "rotated_impulses",
            "head.global_pointer",
            "neighbours rotated with cosines and sines repeated block after block",
        ),
        ("rotated_impulses", "head.efficient_global_pointer", "query and key in halves"),
        ("end_and_start_terms", "head.efficient_global_pointer", "end term at the start"),
        ("shared_and_type_terms_add", "head.efficient_global_pointer", "type terms after the rotation"),
        ("quadratic_in_x", "head.global_pointer", "-1e12 for -inf"),
        ("single_span", "head.decode_spans", "ends exclusive"),
        ("strictly_above", "head.decode_spans", "at the threshold too"),
        ("threshold_shifts", "head.decode_spans", "best score first"),
        ("best_of_one", "head.best_span", "one token too long"),
        ("ties_in_order", "head.best_span", "last of equal scores"),
        ("score_of_the_span", "head.best_span", "start and end chosen separately, the end may come first"),
    ],
)
def test_laws_hold_and_fail(law: str, op: str, bug: str) -> None:
    chosen = next(entry for entry in family.LAWS if entry.name == law and op in entry.operators)
    wrong = next(m for m in (*family.MUTANTS, *family.MUSEUM) if (m.op, m.bug) == (op, bug))
    assert check_law("right", getattr(head, op.split(".")[1]), chosen, op, FLOAT64, 5).outcome == "pass"
    with np.errstate(all="ignore"):
        assert check_law("wrong", wrong.call, chosen, op, FLOAT64, 25).outcome == "logic"


@pytest.mark.parametrize("mutant", [*family.MUTANTS, *family.MUSEUM], ids=lambda m: f"{m.op}: {m.bug}")
def test_every_mutant_dies_by_a_vector(mutant) -> None:
    with np.errstate(all="ignore"):
        verdicts = [judge("wrong", mutant.call, vector, FLOAT64) for vector in _vectors(mutant.op)]
    assert any(v.outcome in ("logic", "precision") for v in verdicts)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_rounding_to_16_bits_nearly_fills_the_bound(dtype: str) -> None:
    worst = 0.0
    for op in ("head.classify", "head.choose", "head.global_pointer", "head.efficient_global_pointer"):
        for vector in _vectors(op):
            if dtype in vector.case.dtypes:
                declared = Profile(dtype, "strict", "A64")
                verdict = judge("right", _stored(getattr(head, op.split(".")[1]), dtype), vector, declared)
                assert verdict.outcome == "pass", (vector.case.id, verdict.message)
                worst = max(worst, 0.0 if vector.case.exact else verdict.ratio)
    assert 0.2 < worst <= 1


def _stored(function, dtype: str):
    def rounded(**arguments):
        target = storage_type(dtype)
        wide = {k: v.astype(np.float64) if getattr(v, "dtype", None) == target else v for k, v in arguments.items()}
        return function(**wide).astype(target)

    return rounded
