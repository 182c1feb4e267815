"""PyTorch's kernels behind our argument names: literal values, declared precision, deviations that still deviate."""

import math

import numpy as np
import pytest

from conformance import vectors
from conformance.adapters import deviations, pytorch
from conformance.budget import Profile
from conformance.case import OPERATORS, Unsupported, cases, storage_type
from conformance.law import call
from conformance.verdict import judge

pytest.importorskip("torch")

IMPLEMENTATIONS = pytorch.implementations()
DEVIATIONS = deviations("torch")
FIRST = {}
# An inexact case, where the operator has one.
for case in sorted(cases(), key=lambda c: c.exact):
    if not any(line.pattern == case.id for line in DEVIATIONS):
        FIRST.setdefault(case.op, case)


def function(op, dtype="float64", profile="strict"):
    return next(
        i.functions[op] for i in IMPLEMENTATIONS if i.profile == Profile(dtype, profile, "A64") if op in i.functions
    )


def test_every_claim_is_an_operator():
    claimed = {op for i in IMPLEMENTATIONS for op in i.functions}
    assert len(claimed) > 25
    assert claimed <= set(OPERATORS())


@pytest.mark.parametrize("op", sorted({op for i in IMPLEMENTATIONS for op in i.functions}))
def test_a_case_of_each_operator_passes_in_every_declared_precision(op):
    vector = vectors.build(FIRST[op])
    judged = [i for i in IMPLEMENTATIONS if op in i.functions and i.profile.dtype in vector.case.dtypes]
    verdicts = [judge(i.name, i.functions[op], vector, i.profile) for i in judged]
    assert [v.message for v in verdicts if v.outcome != "pass"] == []
    assert {v.dtype for v in verdicts} >= {"float64", "float32"}


@pytest.mark.parametrize(
    "line", [d for d in DEVIATIONS if any(c.id == d.pattern for c in cases())], ids=lambda d: d.pattern
)
def test_a_deviation_still_deviates(line):
    vector = vectors.build(next(c for c in cases() if c.id == line.pattern))
    judged = [i for i in IMPLEMENTATIONS if vector.case.op in i.functions and line.dtype in ("*", i.profile.dtype)]
    assert any(judge(i.name, i.functions[vector.case.op], vector, i.profile).failed for i in judged)


def test_a_wrong_mapping_is_found():
    vector = vectors.build(FIRST["rope.rotate_interleaved"])
    verdict = judge("torch", function("rope.rotate_half_split"), vector, Profile("float64"))
    assert verdict.outcome == "logic"


def test_neighbouring_query_heads_share_a_key_head():
    # One key: the weights are 1 and every query head returns the value of its own key head.
    q, k = np.ones((1, 2, 6, 3)), np.ones((1, 1, 2, 3))
    v = np.array([[[[10.0, 1.0], [20.0, 2.0]]]])
    for backend in ("torch", "torch, flash backend"):
        attend = next(i.functions["attention.attend"] for i in IMPLEMENTATIONS if i.name == backend)
        y = attend(q=q, k=k, v=v, mask=None, kernel="softmax", scale=1.0)
        assert y.shape == (1, 2, 6, 2)
        np.testing.assert_array_equal(y[0, :, :, 0], [[10, 10, 10, 20, 20, 20]] * 2)


def test_attention_weighs_scores_and_hides_masked_keys():
    # Scores ln 3 and 0: weights 3/4 and 1/4; the second query sees the second key alone, the third nothing.
    q, k = np.full((1, 3, 1, 1), math.log(3.0)), np.array([1.0, 0.0]).reshape(1, 2, 1, 1)
    v, mask = np.array([8.0, 4.0]).reshape(1, 2, 1, 1), np.array([[True, True], [False, True], [False, False]])
    y = function("attention.attend")(q=q, k=k, v=v, mask=mask, kernel="softmax", scale=1.0)
    np.testing.assert_allclose(y.ravel(), [7, 4, 0], rtol=1e-14)


def test_other_attention_kernels_are_declined():
    x = np.ones((1, 1, 1, 1))
    with pytest.raises(Unsupported, match="softmax kernel only"):
        function("attention.attend")(q=x, k=x, v=x, mask=None, kernel="laplace", scale=1.0)


def test_rotations_turn_counterclockwise_in_their_layout():
    x, positions = np.array([1.0, 0, 0, 0]).reshape(1, 1, 1, 4), np.array([[2]])
    c, s = math.cos(2.0), math.sin(2.0)
    turned = {
        "rope.rotate_interleaved": ({}, [c, s, 0, 0]),
        "rope.rotate_half_split": ({}, [c, 0, s, 0]),
        "rope.rotate_contiguous": ({"rotary_width": 2, "layout": "half_split"}, [c, s, 0, 0]),
        "rope.rotate_proportional": ({"rotary_width": 2}, [c, 0, s, 0]),
    }
    for op, (options, expected) in turned.items():
        y = function(op)(x=x, positions=positions, base=100.0, **options)
        np.testing.assert_allclose(y.ravel(), expected, atol=1e-15)


def test_gradients_come_from_autograd():
    G, A, B = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0], [10.0]]), np.array([[5.0, 7.0]])
    dA, dB = function("lora.gradients_dense")(G=G, A=A, B=B, scale=2.0)
    np.testing.assert_array_equal(dA, [[2 * 19.0], [2 * 43.0]])
    np.testing.assert_array_equal(dB, [[2 * 31.0, 2 * 42.0]])
    new_A, new_B = function("lora.sgd")(A=A, B=B, G=G, scale=2.0, learning_rate=0.5)
    np.testing.assert_array_equal(new_A, [[1 - 19.0], [10 - 43.0]])
    np.testing.assert_array_equal(new_B, [[5 - 31.0, 7 - 42.0]])
    np.testing.assert_array_equal(function("lora.sgd_frozen")(A=A, B=B, G=G, scale=2.0, learning_rate=0.5), new_B)


def test_adamw_counts_the_step_that_it_takes():
    one = np.array([4.0])
    options = {"learning_rate": 0.5, "beta_1": 0.5, "beta_2": 0.75, "epsilon": 1.0, "weight_decay": 0.25}
    y, m, v = function("lora.adamw_array")(parameter=one, gradient=2 * one, m=0 * one, v=0 * one, step=1, **options)
    # m = 4, v = 16; corrected 8 and 64; 4 (1 - 1/8) - 8 / (8 + 1) / 2.
    np.testing.assert_allclose([y[0], m[0], v[0]], [3.5 - 4 / 9, 4, 16], rtol=1e-15)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_arrays_keep_their_format_and_arguments_stay(dtype):
    case = next(c for c in cases(["attention.attend"]) if c.name == "grouped").under(Profile(dtype))
    attend = next(
        i.functions["attention.attend"]
        for i in IMPLEMENTATIONS
        if i.profile.dtype == dtype and i.functions.get("attention.attend")
    )
    # call() raises when an argument was modified.
    assert call(attend, case)[0].dtype == np.float64
    y = function("activation.relu", dtype)(x=np.array([-1.5, 2.5], storage_type(dtype)))
    assert y.dtype == storage_type(dtype)
    np.testing.assert_array_equal(y.astype(np.float64), [0, 2.5])


def test_declared_profiles_are_no_looser_than_needed():
    vector = vectors.build(next(c for c in cases(["attention.attend"]) if c.id == "attention.attend/grouped"))
    attend = function("attention.attend", "bfloat16", "fused")
    assert judge("torch", attend, vector, Profile("bfloat16", "strict", "A64")).outcome == "precision"
    rotated = vectors.build(FIRST["rope.rotate_interleaved"])
    rotate = function("rope.rotate_interleaved", "bfloat16", "eager")
    assert judge("torch", rotate, rotated, Profile("bfloat16", "strict", "A64")).outcome == "precision"
