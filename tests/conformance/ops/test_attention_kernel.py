"""The references of attention_kernel by hand, its laws on right and wrong implementations, its bounds."""

import functools
import math

import numpy as np
import pytest

from conformance import vectors, verdict
from conformance.adapters import spec
from conformance.budget import MP, Arithmetic, Profile, round_to
from conformance.case import OPERATORS
from conformance.ops import attention_kernel

FLOAT32 = Profile("float32")
A = Arithmetic(FLOAT32, digits=True)


@functools.cache
def vector(identifier):
    return vectors.build(next(c for c in attention_kernel.CASES if c.id == identifier))


def mutant(op, bug):
    every = (*attention_kernel.MUTANTS, *attention_kernel.MUSEUM)
    return next(m.call for m in every if m.op == op and m.bug.startswith(bug))


def law(name):
    return next(entry for entry in attention_kernel.LAWS if entry.name == name)


def holds(function, name, op, profile=FLOAT32):
    # Mutants divide by zero where they are wrong.
    with np.errstate(all="ignore"):
        return not verdict.check_law("mine", function, law(name), op, profile, 25).failed


def bits(*rows):
    return np.array([[c == "1" for c in row] for row in rows])


# References.


def test_reference_of_softmax_by_hand():
    scores = A.exact(np.array([[1.0, 1.0, 9.0], [5.0, 2.0, 7.0], [1.0, 2.0, 3.0]]))
    out = attention_kernel.softmax(A, scores, bits("110", "010", "000"))
    assert out.value.tolist() == [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 0]]
    # No radius where the mask decides.
    assert out.rad[2].tolist() == [0, 0, 0]
    assert out.rad[0, 2] == 0


def test_reference_of_softmax_plus_knows_its_rational_factors():
    # ln 8 / ln 512 = 1/3 and ln 2 / ln 512 = 1/9: scores 9 apart become e^3 and e^1.
    scores = A.exact(np.array([[9.0, 0, 0, 0, 0, 0, 0, 0, 50]] * 2))
    out = attention_kernel.softmax_plus(A, scores, bits("111111110", "110000000"), n_min=1)
    np.testing.assert_allclose(out.value[0, :2], [math.e**3 / (math.e**3 + 7), 1 / (math.e**3 + 7)], rtol=1e-15)
    np.testing.assert_allclose(out.value[1, :2], [math.e / (math.e + 1), 1 / (math.e + 1)], rtol=1e-15)
    floored = attention_kernel.softmax_plus(A, scores, bits("110000000"), n_min=8)
    np.testing.assert_allclose(floored.value[1, :2], [math.e**3 / (math.e**3 + 1), 1 / (math.e**3 + 1)], rtol=1e-15)


@pytest.mark.parametrize(
    ("function", "options", "expected"),
    [
        ("squared_relu_visible", {}, [[2, 0, 0, 0], [16 / 3, 0, 3, 0]]),
        ("squared_relu_array", {}, [[1, 0, 0, 0], [4, 0, 2.25, 0]]),
        ("squared_relu_constant", {"length": 2}, [[2, 0, 0, 0], [8, 0, 4.5, 0]]),
    ],
)
def test_references_of_squared_relu_by_hand(function, options, expected):
    scores = A.exact(np.array([[2.0, -1.0, 5.0, 7.0], [4.0, -1.0, 3.0, 7.0]]))
    out = getattr(attention_kernel, function)(A, scores, bits("1100", "1110"), **options)
    np.testing.assert_allclose(out.value, expected, rtol=1e-15)


def test_reference_of_laplace_is_the_normal_distribution_to_50_digits():
    out = attention_kernel.laplace(A, A.exact(np.array([0.0, 1.0])), bits("10")[0])
    expected = MP.ncdf(0, MP.sqrt(MP.mpf(1) / 2), MP.sqrt(1 / (4 * MP.pi)))
    assert abs(out.mid[0] - expected) < MP.mpf(10) ** -48
    assert out.mid[1] == 0 and out.rad[1] == 0


# Laws.


@pytest.mark.parametrize(
    ("name", "op", "bug"),
    [
        ("masked_scores_do_not_matter", "softmax", "the maximum subtracted is that of all keys"),
        ("rows_sum_to_one", "softmax", "no maximum is subtracted"),
        ("rows_sum_to_one", "softmax", "masked after the normalisation"),
        ("log_weight_slope", "softmax_plus", "the training length is 511"),
        ("log_weight_slope", "softmax_plus", "n_min is ignored"),
        ("a_broadcast_mask_is_the_mask_written_out", "softmax_plus", "without a mask n counts the queries"),
        ("masked_keys_may_be_added", "squared_relu_visible", "divided by the length of the array"),
        ("signs_split_the_square", "squared_relu_visible", "not squared"),
        ("masked_keys_dilute", "squared_relu_array", "divided by the visible keys"),
        ("signs_split_the_square", "squared_relu_constant", "not divided"),
        ("weights_are_normal_probabilities", "laplace", "deviation 0.282"),
        ("masked_scores_do_not_matter", "laplace", "masked before the activation"),
    ],
)
def test_laws_hold_for_the_specification_and_fail_for_a_mutant(name, op, bug):
    op = f"attention_kernel.{op}"
    assert holds(OPERATORS()[op].call, name, op, Profile("float64", "strict", "A64"))
    assert not holds(mutant(op, bug), name, op)


# Bounds.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["softmax", "softmax_plus", "squared_relu_visible", "squared_relu_constant", "laplace"])
def test_a_final_rounding_uses_most_of_a_16_bit_bound(op, dtype):
    found = vector(f"attention_kernel.{op}/rows-of-every-kind")
    ratio = verdict.compare([round_to(found.expected["y"], dtype)], found, Profile(dtype), exact=False).ratio
    assert 0.2 < ratio <= 1


def test_float32_arithmetic_passes_and_half_precision_exponentials_do_not():
    found = vector("attention_kernel.softmax/above-88")
    member = next(i for i in spec.implementations() if i.name == "spec float32 reversed")
    assert verdict.judge("mine", member.functions[found.case.op], found, FLOAT32).outcome == "pass"

    def coarse(scores, mask):
        return round_to(attention_kernel.np_softmax(scores.astype(np.float64), mask), "float16")

    assert verdict.judge("mine", coarse, found, FLOAT32).outcome in ("precision", "logic")
