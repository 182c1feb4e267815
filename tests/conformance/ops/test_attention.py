"""The references of attention by hand, its laws on right and wrong implementations, its bounds."""

import functools

import numpy as np
import pytest

from conformance import vectors, verdict
from conformance.adapters import spec
from conformance.budget import Arithmetic, Profile, round_to
from conformance.case import OPERATORS
from conformance.ops import attention

FLOAT32 = Profile("float32")
A = Arithmetic(FLOAT32, digits=True)


@functools.cache
def vector(identifier):
    return vectors.build(next(c for c in attention.CASES if c.id == identifier))


def mutant(op, bug):
    every = (*attention.MUTANTS, *attention.MUSEUM)
    return next(m.call for m in every if m.op == op and m.bug.startswith(bug))


def holds(function, name, op, profile=FLOAT32):
    law = next(entry for entry in attention.LAWS if entry.name == name and op in entry.operators)
    # Mutants divide by zero where they are wrong.
    with np.errstate(all="ignore"):
        return not verdict.check_law("mine", function, law, op, profile, 25).failed


# References.


def test_reference_of_attend_by_hand():
    # Two query heads share one key head; scores 2 and -1 after the scale, squares 4 and 0 (a masked 9).
    q = A.exact(np.array([[[[2.0], [-1.0]]]]))
    k = A.exact(np.array([[[[2.0]], [[-1.0]], [[3.0]]]]))
    v = A.exact(np.array([[[[1.0, 10]], [[2, 20]], [[4, 40]]]]))
    mask = np.array([True, True, False]).reshape(1, 1, 1, 3)
    out = attention.attend(A, q, k, v, mask, "squared_relu_1", 0.5)
    # Head 0: scores 2, -1: 4 v0. Head 1: scores -1, 1/2: v1 / 4.
    assert out.value.tolist() == [[[[4, 40], [0.5, 5]]]]


def test_reference_of_grouped_heads_shares_neighbours():
    v = A.exact(np.arange(2.0).reshape(1, 1, 2, 1))
    ones = A.exact(np.ones((1, 1, 6, 1))), A.exact(np.ones((1, 1, 2, 1)))
    out = attention.attend(A, *ones, v, None, "softmax", 1.0)
    assert out.value.ravel().tolist() == [0, 0, 0, 1, 1, 1]


def test_reference_of_rotated_values_by_hand():
    q, k = A.exact(np.zeros((1, 1, 1, 2))), A.exact(np.zeros((1, 2, 1, 2)))
    v = A.exact(np.array([[[[1.0, 0.0]], [[0.0, 2.0]]]]))
    out = attention.attend_rotated_values(A, q, k, v, None, np.array([0, 3]), "interleaved", 10000.0, "softmax", 1.0)
    np.testing.assert_allclose(out.value.ravel(), [0.5 - np.sin(3), np.cos(3)], rtol=1e-14)


def test_reference_of_the_layer_takes_columns_head_by_head():
    # One token: the output is its value; two heads of width 1 are swapped by W_o.
    x = A.exact(np.array([[[3.0, 5.0]]]))
    eye, swap = A.exact(np.eye(2)), A.exact(np.array([[0.0, 1.0], [1.0, 0.0]]))
    options = {"heads": 2, "layout": "interleaved", "base": 100.0, "kernel": "softmax"}
    b_o = A.exact(np.array([10.0, 20.0]))
    out = attention.cross_attention(
        A, x, x, None, None, None, eye, None, eye, None, eye, None, swap, b_o, **options
    )  # fmt: skip
    assert out.value.tolist() == [[[15.0, 23.0]]]


def test_references_of_masks_and_positions_by_hand():
    assert attention.causal_mask(A, 2, 3).tolist() == [[True, True, False], [True, True, True]]
    assert attention.causal_mask(A, 2, 1).tolist() == [[False], [True]]
    assert attention.unilm_mask(A, np.array([0, 0, 1])).tolist() == [[True, True, False]] * 2 + [[True] * 3]
    valid = np.array([[False, True, True, False]])
    assert attention.positions_from_mask(A, valid).tolist() == [[0, 0, 1, 1]]


# Laws.


@pytest.mark.parametrize(
    ("name", "op", "bug"),
    [
        ("repeated_key_heads_are_grouped_heads", "attend", "key heads are tiled"),
        ("masked_keys_do_not_matter", "attend", "the mask is ignored"),
        ("equal_values_come_back", "attend", "a fully masked row is the mean"),
        ("one_hot_values_show_the_weights", "attend", "the scale is 1/√d whatever is asked"),
        ("rotated_values_are_complex_products", "attend_rotated_values", "the two halves of pairs"),
        ("projection_is_affine", "project", "inputs are rounded to bfloat16"),
        ("selected_features_attend_as_complex_numbers", "multi_head_attention", "columns are feature-major"),
        ("padding_stands_on_either_side", "multi_head_attention", "positions count padding"),
        ("biases_are_weights_of_a_constant_feature", "cross_attention", "b_v is missing"),
        ("a_common_shift_of_positions_changes_nothing", "cross_attention", "values are rotated too"),
    ],
)
def test_laws_hold_for_the_specification_and_fail_for_a_mutant(name, op, bug):
    op = f"attention.{op}"
    assert holds(OPERATORS()[op].call, name, op, Profile("float64", "strict", "A64"))
    assert not holds(mutant(op, bug), name, op)


@pytest.mark.parametrize("name", ["masked_keys_do_not_matter", "padding_stands_on_either_side"])
def test_laws_hold_where_every_operation_rounds_to_bfloat16(name):
    member = next(i for i in spec.implementations() if i.name == "spec bfloat16 eager")
    op = "attention.multi_head_attention"
    assert holds(member.functions[op], name, op, member.profile)


# Bounds.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["attend/heads", "multi_head_attention/plain", "cross_attention/grouped"])
def test_a_final_rounding_uses_most_of_a_16_bit_bound(case, dtype):
    found = vector(f"attention.{case}")
    ratio = verdict.compare([round_to(found.expected["y"], dtype)], found, Profile(dtype), exact=False).ratio
    assert 0.2 < ratio <= 1


def test_float32_arithmetic_passes_and_rounded_keys_do_not():
    found = vector("attention.attend/dense")
    member = next(i for i in spec.implementations() if i.name == "spec float32 split")
    assert verdict.judge("mine", member.functions[found.case.op], found, FLOAT32).outcome == "pass"
    out = OPERATORS()["attention.attend"].call(**{**found.case.arguments, "k": round_to(found.case["k"], "bfloat16")})
    assert not verdict.compare([out], found, FLOAT32, exact=False).ok


def test_a_wrong_layer_is_named():
    found = vector("attention.multi_head_attention/grouped")
    function = mutant("attention.multi_head_attention", "keys are not rotated")
    wrong = verdict.judge("mine", function, found, Profile("float64", "strict", "A64"))
    assert wrong.outcome == "logic"
    assert "keys are not rotated" in [m.bug for m, _ in verdict.diagnose([(wrong, found)])]
